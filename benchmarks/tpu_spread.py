"""What holds the memory of a training step that is spread over 16 v5e chips, by class of buffer; needs no TPU.

    TORCH_DEVICE_BACKEND_AUTOLOAD=0 python benchmarks/tpu_spread.py [--layers 3 --layers 16] [-o FILE]

The GPT of 877 million parameters (`tpu_models.py`, 16 layers; fewer compile sooner), batch 16, by the patterns that
`kpt fit --search` takes for it: with products of gathered weights in windows, as the compiler would have it, and whole.
Bytes of one device, from the compiler's own buffer assignment; unverified on hardware.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from kernel_pytorch.backends.tpu.ahead import Lowered, compile_lowered, lower_program
from kernel_pytorch.backends.tpu.sharding import argument_shardings, spread_marks
from kernel_pytorch.backends.tpu.topology import parse_topology
from kernel_pytorch.core.types import Candidate, Mode, Step
from kernel_pytorch.fit.build import Build

HERE = Path(__file__).resolve().parent
OUT = HERE / "results" / "tpu-ahead" / "spread.json"
TOPOLOGY, BATCH = "v5e:4x4", 16
CANDIDATE = Candidate(
    (
        Step("chunked_attention", {"rows": 1024}),
        Step("chunked_loss", {"rows": 2048, "spread": True}),
        Step("recompute", {"block": "Block", "keep": "", "plain": 0, "spread": True}),
        Step("shard", {"parameters": "sharded", "rows": "Block"}),
    )
)


def target(layers: int) -> Any:
    import tpu_models

    return tpu_models.workload(replace(tpu_models.GPT_877M, layers=layers))


def run(lowered: Lowered, flops: int, *, windows: bool) -> dict[str, Any]:
    """Return what one device holds; `flops` are the unmodified step's."""
    where = parse_topology(TOPOLOGY)
    began = time.perf_counter()
    compiled = compile_lowered(
        replace(lowered, stablehlo=spread_marks(lowered.stablehlo, where.devices)),
        where,
        partitions=where.devices,
        argument_shardings=argument_shardings(lowered.arguments, where.devices, "sharded"),
        windows=windows,
    )
    classes: Counter[str] = Counter()
    for buffer in compiled.buffers:
        classes[f"argument_{_role(buffer.name)}" if buffer.kind == "argument" else _kind(buffer.source)] += buffer.bytes
    return {
        "candidate": str(CANDIDATE),
        "fits": compiled.fits,
        "message": compiled.message.splitlines()[0] if compiled.message else "",
        "peak_bytes": compiled.peak_bytes,
        "assigned_bytes": compiled.assigned_bytes,
        "argument_bytes": compiled.argument_bytes,
        "code_bytes": compiled.code_bytes,
        "at_the_peak_bytes": dict(classes.most_common()),
        "largest": [
            {"shape": b.shape, "source": b.source, "bytes": b.bytes} for b in compiled.buffers if b.kind != "argument"
        ][:12],
        "collectives": dict(compiled.collectives),
        "collective_counts": dict(compiled.collective_counts),
        "extra_flops": lowered.flops / flops - 1.0,
        "compile_seconds": round(time.perf_counter() - began),
        "software": dict(compiled.software),
        "verified": False,
    }


def _role(name: str) -> str:
    return "optimizer" if name.endswith((".exp_avg", ".exp_avg_sq", ".step")) else "other"


def _kind(source: str) -> str:
    module = source.rpartition("/")[0]
    backward = "_backward" if module.endswith("(backward)") else ""
    if "attention" in module:
        return f"attention{backward}"
    if module.startswith("blocks."):
        return f"blocks{backward}"
    return f"{module.removesuffix(' (backward)').replace(' ', '_') or 'unnamed'}{backward}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, action="append", help="3 and 16 by default")
    parser.add_argument("--again", action="store_true", help="also those that are in the file")
    parser.add_argument("-o", "--output", type=Path, default=OUT)
    options = parser.parse_args()
    for layers in options.layers or (3, 16):
        flops = lower_program(Build(target(layers), Mode.TRAINING, batch=BATCH)).flops
        lowered = lower_program(Build(target(layers), Mode.TRAINING, batch=BATCH, candidate=CANDIDATE))
        for windows in (True, False):
            name = f"{layers}_layers" if windows else f"{layers}_layers_products_whole"
            known = json.loads(options.output.read_text()) if options.output.exists() else {}
            if name in known and not options.again:
                continue
            entry = known[name] = run(lowered, flops, windows=windows)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(known, indent=1) + "\n")
            print(name, entry["peak_bytes"], entry["assigned_bytes"], f"{entry['compile_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
