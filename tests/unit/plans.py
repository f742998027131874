"""Small plans for tests."""

from __future__ import annotations

import math

from kernel_pytorch.core.types import (
    Candidate,
    Check,
    DeviceSpec,
    Gate,
    Measurement,
    Mode,
    NumericsReport,
    OperatorShare,
    Plan,
    Prediction,
    Ratio,
    Skipped,
    Status,
    Step,
    TensorSignature,
    Trial,
    Untried,
    WorkloadSpec,
)


def device(**changes) -> DeviceSpec:
    fields = {
        "vendor": "cpu",
        "name": "Test CPU",
        "arch": "x86_64-avx512_bf16",
        "memory_bytes": 8 << 30,
        "num_devices": 2,
        "features": ("avx512_bf16", "cxx_compiler"),
        "peak_flops": {"float32": 1e11, "bfloat16": 2e11},
        "bandwidth_bytes_per_s": 2e10,
        "software": {"torch": "2.13.0", "python": "3.11"},
        "sources": {"peak_flops": "measured"},
    }
    return DeviceSpec(**{**fields, **changes})


def workload(**changes) -> WorkloadSpec:
    fields = {
        "name": "tiny",
        "fingerprint": "f" * 16,
        "mode": Mode.INFERENCE,
        "signatures": {"main": (TensorSignature((2, 4), "float32"),)},
        "weights": {"main": 1.0},
        "parameters": 20,
        "parameter_bytes": 80,
        "buffer_bytes": 0,
        "dtypes": ("float32",),
        "modules": {"Linear": 1},
        "blocks": {},
        "operators": {"aten.addmm": 1},
    }
    return WorkloadSpec(**{**fields, **changes})


def trial(*steps: Step, phase: str = "screen", ratio: float = 2.0, **changes) -> Trial:
    fields = {
        "candidate": Candidate(tuple(steps)),
        "status": Status.OK,
        "numerics": NumericsReport(
            (
                Check("output[0]", Gate.PRECISION, 1e-3, 2e-2, case="main"),
                Check("structure output", Gate.CONTRACT, 0.0, 0.0),
            ),
            cosine=0.9999,
        ),
        "measurement": Measurement(
            (1.0, 1.1, 0.9), (2.0, 2.1, 1.9), Ratio(ratio, ratio * 0.95, ratio * 1.05), 1 << 20, 2 << 20, 3.0
        ),
        "phase": phase,
        "layers_ms": {"0": (1.0, 0.5)},
        "seconds": 1.5,
    }
    return Trial(**{**fields, **changes})


BF16 = Step("dtype", {"dtype": "bfloat16"})


def plan(*steps: Step, **changes) -> Plan:
    chosen = trial(*(steps or (BF16,)), phase="confirm")
    wrong = Trial(
        Candidate((Step("quantize", {"scheme": "int8_dynamic", "keep": True, "ratio": 1.0}),)),
        Status.WRONG,
        "error above the budget",
        NumericsReport(
            (Check("output[0]", Gate.PRECISION, math.inf, 2e-2), Check("nan", Gate.CONTRACT, math.nan, 0.0))
        ),
    )
    fields = {
        "device": device(),
        "workload": workload(),
        "chosen": chosen,
        "evidence": (trial(*(steps or (BF16,))), wrong, chosen),
        "skipped": (Skipped("compile", "no C++ compiler", "apt-get install g++"),),
        "untried": (Untried(Candidate((Step("channels_last"),)), "budget"),),
        "prediction": Prediction(
            2.0, 0.5, 1e6, 1e5, (OperatorShare("matmul", 1.0, 1, 1e6, 1e5),), {"dtype": 2.0, "compile": math.inf}
        ),
        "config": {"mode": "inference", "max_error": 2e-2, "only": [], "memory_limit_bytes": None},
        "created": "2026-01-01T00:00:00+00:00",
        "package_version": "0.1.0",
        "command": "kpt optimize tiny.py:workload",
    }
    return Plan(**{**fields, **changes})
