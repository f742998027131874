"""Memory patterns found by `kpt fit --search` for GPTs on TPU slices, by the real compiler on a host without a TPU.

    python benchmarks/tpu_memory.py [--only gpt_111m] [-o FILE]

One entry a case, written as soon as it is known; what is in the file already is not run again. Needs what `kpt fit`
needs (docs/fit.md). Peaks are the compiler's own, unverified on hardware; operations are PyTorch's count. With
KPT_TPU_COMPILED=DIR a run that was interrupted goes on where it was; `seconds` by the clock are then not told.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel_pytorch.backends.tpu.topology import parse_topology
from kernel_pytorch.core.types import Mode
from kernel_pytorch.fit.build import Build
from kernel_pytorch.fit.patterns import search_patterns
from kernel_pytorch.report.fit_search import search_data

HERE = Path(__file__).resolve().parent
OUT = HERE / "results" / "tpu-ahead" / "memory.json"


@dataclass(frozen=True, slots=True)
class Case:
    """A target, a slice, and the peak asked for on one device."""

    target: str
    topology: str
    memory_gb: float | None
    batch: int | None = None
    max_extra_flops: float = 0.15


CASES = {
    "gpt_111m": Case("tpu_models.py:gpt_111m", "v5e:1", 2.2),
    "gpt_877m": Case("tpu_models.py:gpt_877m", "v5e:4x4", 1.8, batch=16, max_extra_flops=0.34),
    "gpt2_of_transformers": Case("tpu_models.py:gpt2_of_transformers", "v5e:1", None),
    "llama_of_transformers": Case("tpu_models.py:llama_of_transformers", "v5e:1", None),
}


def run(case: Case) -> dict[str, Any]:
    began = time.perf_counter()
    build = Build(str(HERE / case.target), Mode.TRAINING, batch=case.batch)
    searched = search_patterns(
        build,
        parse_topology(case.topology),
        memory_bytes=None if case.memory_gb is None else round(case.memory_gb * 1e9),
        max_extra_flops=case.max_extra_flops,
        name=case.target,
        tell=lambda line: print(f"  {line}", flush=True),
    )
    took = None if os.environ.get("KPT_TPU_COMPILED") else round(time.perf_counter() - began, 1)
    data = search_data(searched)
    compiling = sum(t["fit"]["seconds"]["compile"] for t in data["tried"] if t["fit"] is not None)
    for tried in data["tried"]:
        if tried["fit"] is not None:
            # The largest buffers of each would be most of the file; what holds the memory stands by module.
            tried["fit"]["buffers"], tried["fit"]["modules"] = [], tried["fit"]["modules"][:8]
    if data["chosen"] is not None:
        data["chosen"] = data["chosen"]["label"]
    asked = {"target": case.target, "topology": case.topology, "memory_gb": case.memory_gb, "batch": case.batch}
    return {**asked, **data, "compile_seconds": round(compiling, 1), "seconds": took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, action="append", help="cases to run; all by default")
    parser.add_argument("--again", action="store_true", help="also those that are in the file")
    parser.add_argument("-o", "--output", type=Path, default=OUT)
    options = parser.parse_args()
    found = json.loads(options.output.read_text()) if options.output.exists() else {"cases": {}}
    for name, case in CASES.items():
        if (options.only and name not in options.only) or (name in found["cases"] and not options.again):
            continue
        print(name, flush=True)
        found["cases"][name] = run(case)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1) + "\n")
        print(f"  chosen: {found['cases'][name]['chosen']}", flush=True)


if __name__ == "__main__":
    main()
