"""How often the interval of a real, interleaved measurement covers a ratio that is known.

Two functions run the same product 20 and 20, or 20 and 19 times, so the true ratio is 1 and 20/19. Each repeat is one
`measure.sampler.compare` of a fixed number of pairs, as a confirmation makes it.

    python benchmarks/interval_real.py -o benchmarks/results/DEVICE/interval_real.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from kernel_pytorch.backends import manager_for
from kernel_pytorch.measure.sampler import compare
from kernel_pytorch.measure.stats import paired_ratio

PARTS = 20


def repeated(times: int, x: torch.Tensor, weight: torch.Tensor):
    def run() -> torch.Tensor:
        for _ in range(times):
            y = x @ weight
        return y

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("-n", "--repeats", type=int, default=100, help="of each kind")
    parser.add_argument("--pairs", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    manager = manager_for()
    x, weight = torch.randn(512, 192), torch.randn(192, 192)
    cells = {}
    for kind, parts in (("identity", PARTS), ("planted", PARTS - 1)):
        truth, rows = PARTS / parts, []
        base, ours = repeated(PARTS, x, weight), repeated(parts, x, weight)
        for _ in range(args.repeats):
            m = compare(manager, base, ours, max_seconds=20.0, min_pairs=args.pairs, max_pairs=args.pairs)
            ratio = paired_ratio(m.baseline_samples_ms, m.samples_ms)
            load = m.telemetry.get("foreign_load_cores", 0.0)
            rows.append([ratio.value, ratio.low, ratio.high, len(m.samples_ms), load])
        covered = sum(low <= truth <= high for _, low, high, _, _ in rows)
        cells[kind] = {"true_ratio": truth, "repeats": len(rows), "covered": covered, "rows": rows}
        print(f"{kind}: the interval covered {truth:.4f} in {covered} of {len(rows)} repeats", flush=True)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        artefact = {"device": manager.spec.key, "pairs": args.pairs, "confidence": 0.95, **cells}
        args.output.write_text(json.dumps(artefact, indent=1) + "\n")


if __name__ == "__main__":
    main()
