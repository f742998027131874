"""What a loop over the blocks of a GPT takes and saves on a TPU, against the same blocks written out.

    python benchmarks/tpu_scan.py [--only NAME] [--again] [-o FILE]

One training step of the GPT of 111 million parameters, batch 8 x 1,024, compiled for one v5e chip by the real compiler
on a host without one: peak of memory, seconds of compilation, operations by PyTorch's count and by the compiler's,
which counts the body of a loop once. One entry a variant, written as soon as it is known. Seconds are those of this
machine, whatever else ran on it; `load` is the machine's average load when the compilation began.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from kernel_pytorch.backends.tpu.ahead import compile_lowered, lower_program
from kernel_pytorch.backends.tpu.topology import parse_topology
from kernel_pytorch.core.types import Candidate, Mode, Step
from kernel_pytorch.fit.build import Build

HERE = Path(__file__).resolve().parent
OUT = HERE / "results" / "tpu-ahead" / "scan.json"
TOPOLOGY = "v5e:1"
AROUND = (Step("splash_attention"), Step("chunked_loss", {"rows": 512}))
KEPT = "attention:0,product:2"
"""Attention and its projection, which the search keeps of this model (`memory.json`)."""


def variant(transform: str, keep: str) -> tuple[Step, ...]:
    return (*AROUND, Step(transform, {"block": "Block", "keep": keep, "plain": 0}))


VARIANTS = {
    "unmodified": (),
    "recomputed": variant("recompute", ""),
    "loop": variant("scan_layers", ""),
    "recomputed_but_kept": variant("recompute", KEPT),
    "loop_kept": variant("scan_layers", KEPT),
}


def run(steps: tuple[Step, ...]) -> dict[str, Any]:
    load = os.getloadavg()[0]
    build = Build(str(HERE / "tpu_models.py:gpt_111m"), Mode.TRAINING, candidate=Candidate(steps))
    lowered = lower_program(build)
    compiled = compile_lowered(lowered, parse_topology(TOPOLOGY))
    return {
        "steps": [str(step) for step in steps],
        "fits": compiled.fits,
        "peak_bytes": compiled.peak_bytes,
        "assigned_bytes": compiled.assigned_bytes,
        "code_bytes": compiled.code_bytes,
        "bytes_accessed": compiled.bytes_accessed,
        "flops": lowered.flops,
        "compilers_flops": compiled.flops,
        "program_bytes": len(lowered.stablehlo),
        "lower_seconds": round(lowered.seconds, 1),
        "compile_seconds": round(compiled.seconds, 1),
        "load": round(load, 1),
        "software": dict(compiled.software),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=VARIANTS, action="append", help="variants to run; all by default")
    parser.add_argument("--again", action="store_true", help="also those that are in the file")
    parser.add_argument("-o", "--output", type=Path, default=OUT)
    options = parser.parse_args()
    found = (
        json.loads(options.output.read_text()) if options.output.exists() else {"topology": TOPOLOGY, "variants": {}}
    )
    for name, steps in VARIANTS.items():
        if (options.only and name not in options.only) or (name in found["variants"] and not options.again):
            continue
        found["variants"][name] = run(steps)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1) + "\n")
        told = found["variants"][name]
        print(f"{name}: {told['peak_bytes'] / 1e9:.2f} GB, {told['compile_seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
