"""What the TPU compiler says of training steps of plain GPTs, against its own buffer assignment; needs no TPU.

`python benchmarks/fit_models.py [NAME ...]` appends to `benchmarks/results/tpu-ahead/fit.json`, one entry a case; one
that is there is not run again unless it is named. `agreement` holds the verdicts against the compiler's own figures.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel_pytorch.backends.tpu.ahead import compile_lowered, lower_program
from kernel_pytorch.backends.tpu.topology import parse_topology
from kernel_pytorch.core.types import Mode
from kernel_pytorch.fit.build import Build
from kernel_pytorch.fit.tpu import outcome

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "tpu-ahead" / "fit.json"


@dataclass(frozen=True, slots=True)
class Case:
    factory: str
    topology: str
    batch: int | None = None


CASES = {
    "small v5e": Case("gpt_small", "v5e:1"),
    "111M v5e": Case("gpt_111m", "v5e:1"),
    "111M fused attention v5e": Case("gpt_111m_fused", "v5e:1"),
    "111M v5p": Case("gpt_111m", "v5p:1"),
    "111M batch 32 v5e": Case("gpt_111m", "v5e:1", 32),
    "111M batch 16 v5e": Case("gpt_111m", "v5e:1", 16),
    "111M batch 32 v5p": Case("gpt_111m", "v5p:1", 32),
    "111M batch 256 v5p": Case("gpt_111m", "v5p:1", 256),
    "877M v5e": Case("gpt_877m", "v5e:1"),
    "111M fused attention batch 32 v5e": Case("gpt_111m_fused", "v5e:1", 32),
    "111M fused attention batch 64 v5e": Case("gpt_111m_fused", "v5e:1", 64),
    "GPT-2 of transformers batch 32 v5e": Case("gpt2_of_transformers", "v5e:1", 32),
    "Llama of transformers batch 16 v5e": Case("llama_of_transformers", "v5e:1", 16),
}


def run(case: Case) -> dict[str, Any]:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    target = f"{HERE / 'tpu_models.py'}:{case.factory}"
    topology = parse_topology(case.topology)
    lowered = lower_program(Build(target, Mode.TRAINING, batch=case.batch))
    compiled = compile_lowered(lowered, topology)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    fit = outcome(lowered, compiled, topology, mode=Mode.TRAINING)
    entry: dict[str, Any] = {
        "target": f"benchmarks/tpu_models.py:{case.factory}",
        "topology": case.topology,
        "batch": fit.batch,
        "fits": fit.fits,
        "message": fit.message.splitlines()[0] if fit.message else "",
        "peak_bytes": fit.peak_bytes,
        "assigned_bytes": compiled.assigned_bytes,
        "buffers_at_peak_bytes": sum(b.bytes for b in compiled.buffers),
        "needed_bytes": fit.needed_bytes,
        "capacity_bytes": fit.capacity_bytes,
        "parts": dict(fit.parts),
        "largest_modules": [{"module": m.module, "bytes": m.bytes} for m in fit.modules[:16]],
        "flops": fit.flops,
        "compiler_flops": compiled.flops,
        "bytes_accessed": fit.bytes_accessed,
        "stablehlo_bytes": len(lowered.stablehlo),
        "wall_seconds": wall,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "load_average": os.getloadavg()[0],
        "software": dict(fit.software),
        "verified": False,
    }
    if fit.prediction is not None:
        entry["prediction"] = {
            "step_s": fit.prediction.step_s,
            "serial_s": fit.prediction.serial_s,
            "mfu": fit.prediction.mfu,
            "label": fit.prediction.label,
        }
    return entry


AGREEMENT = "agreement"


def agreement(known: dict[str, Any]) -> dict[str, Any]:
    """Hold each verdict against the compiler's figures: what fits needs no more than the compiler says there is.

    How much there is, its refusals say; a chip for which none was seen is left out.
    """
    cases = {name: case for name, case in known.items() if name != AGREEMENT}
    limits = {c["topology"]: c["capacity_bytes"] for c in cases.values() if c["fits"] is False}
    held = {name: case for name, case in cases.items() if case["topology"] in limits}
    wrong = [
        name
        for name, case in held.items()
        if case["fits"] is not ((case["peak_bytes"] or case["needed_bytes"]) <= limits[case["topology"]])
    ]
    return {
        "cases": len(held),
        "fit": sum(case["fits"] for case in held.values()),
        "do_not_fit": sum(not case["fits"] for case in held.values()),
        "largest_that_fits_bytes": {
            where: max((c["peak_bytes"] for c in held.values() if c["topology"] == where), default=0)
            for where in limits
        },
        "limit_bytes": limits,
        "disagree": wrong,
    }


def main(names: list[str]) -> None:
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names or [name for name in CASES if name not in known]:
        entry = run(CASES[name])
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        known[name] = entry
        known[AGREEMENT] = agreement(known)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(known, indent=2) + "\n")
        print(name, entry["peak_bytes"], entry["assigned_bytes"], entry["fits"], f"{entry['wall_seconds']:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
