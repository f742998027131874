"""Plans that look like real ones, for tests of whatever reads a plan."""

from __future__ import annotations

import math
import random
from dataclasses import replace

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

BASELINE_MS = 258.0

BF16 = Step("dtype", {"dtype": "bfloat16"})
COMPILE = Step("compile", {"mode": "default"})
REDUCE = Step("compile", {"mode": "reduce-overhead"})
THREADS = Step("threads", {"intra": 2})
INT8 = Step("quantize", {"scheme": "int8_dynamic"})
INT8_WEIGHT = Step("quantize", {"scheme": "int8_weight_only"})
AOT = Step("aot_inductor", {})


def make_device(*, verified: bool = True) -> DeviceSpec:
    return DeviceSpec(
        vendor="cpu",
        name="Intel(R) Xeon(R) Platinum 8488C",
        arch="x86_64-avx512_bf16",
        memory_bytes=16 << 30,
        num_devices=2,
        features=("avx2", "avx512f", "avx512_bf16", "amx_bf16", "cxx_compiler"),
        peak_flops={"float32": 2.1e11, "bfloat16": 8.4e11, "int8": 1.6e12},
        bandwidth_bytes_per_s=2.4e10,
        software={"torch": "2.13.0+cpu", "python": "3.11.9", "compiler": "g++ 12.2.0", "torchao": "0.18.0"},
        sources={"peak_flops.float32": "measured", "peak_flops.bfloat16": "measured", "bandwidth": "measured"},
        verified=verified,
    )


def make_spec(name: str = "all-MiniLM-L6-v2", mode: Mode = Mode.INFERENCE) -> WorkloadSpec:
    return WorkloadSpec(
        name=name,
        fingerprint="b1946ac92492d2347c6235b4d2611184",
        mode=mode,
        signatures={"main": (TensorSignature((16, 128), "int64"), TensorSignature((16, 128), "int64"))},
        weights={"main": 1.0},
        parameters=22_713_216,
        parameter_bytes=22_713_216 * 4,
        buffer_bytes=4096,
        dtypes=("float32",),
        modules={"Linear": 37, "LayerNorm": 13, "Embedding": 3},
        blocks={"BertLayer": 6},
        operators={"aten.addmm": 37, "aten.native_layer_norm": 13},
    )


def make_measurement(
    speedup: float, *, seed: int = 0, pairs: int = 40, peak: int | None = 120 << 20, compile_seconds: float = 0.0
) -> Measurement:
    noise = random.Random(seed)
    base, fast = [], []
    for index in range(pairs):
        drift = 1.0 + 0.02 * math.sin(index / 6)
        base.append(BASELINE_MS * drift * noise.lognormvariate(0.0, 0.012))
        fast.append(BASELINE_MS / speedup * drift * noise.lognormvariate(0.0, 0.012))
    return Measurement(
        samples_ms=tuple(fast),
        baseline_samples_ms=tuple(base),
        ratio=Ratio(speedup, speedup * 0.982, speedup * 1.019),
        peak_bytes=peak,
        baseline_peak_bytes=176 << 20,
        compile_seconds=compile_seconds,
        telemetry={"foreign_load_percent": 3.1, "temperature_c": 54.0},
    )


def make_numerics(error: float, *, budget: float = 2e-2, failed: Check | None = None) -> NumericsReport:
    checks = [
        Check("output.last_hidden_state", Gate.STRUCTURE, 2.1e-16, 1e-12, case="perturbed parameters"),
        Check("output.last_hidden_state", Gate.PRECISION, error, budget, case="main"),
        Check("output.pooler_output", Gate.PRECISION, error * 0.6, budget, case="main"),
        Check("dtype output.last_hidden_state", Gate.CONTRACT, 0.0, 0.0),
    ]
    if failed is not None:
        checks.insert(0, failed)
    return NumericsReport(tuple(checks), unchecked=("memory format of outputs",), cosine=1.0 - error**2)


def make_prediction() -> Prediction:
    return Prediction(
        baseline_ms=BASELINE_MS,
        floor_ms=106.0,
        flops=2.23e10,
        bytes=9.3e7,
        shares=(
            OperatorShare("matmul", 0.71, 37, 2.1e10, 4.1e8),
            OperatorShare("attention", 0.11, 6, 1.2e9, 9.0e7),
            OperatorShare("elementwise", 0.09, 62, 4.0e7, 5.3e8),
            OperatorShare("normalization", 0.05, 13, 1.2e7, 1.6e8),
            OperatorShare("embedding", 0.0099, 3, 0.0, 1.0e7),
            OperatorShare("copy", 0.0001, 2, 0.0, 1.0e5),
            OperatorShare("overhead", 0.03, 0, 0.0, 0.0),
        ),
        ceilings={
            str(BF16): 3.4,
            str(COMPILE): 1.35,
            str(INT8): 4.4,
            str(INT8_WEIGHT): 1.2,
            str(THREADS): 1.1,
        },
        notes=("71 % of the time is in matrix multiplications: a lower precision is what can help most.",),
    )


def won_trials() -> tuple[Trial, ...]:
    best = Candidate((BF16, COMPILE))
    layers = {"embeddings": (6.1, 4.9), "encoder": (240.0, 84.0), "pooler": (3.2, 1.4)}
    return (
        Trial(Candidate(), Status.OK, measurement=make_measurement(1.0, seed=9, peak=176 << 20), seconds=8.0),
        Trial(
            Candidate((BF16,)),
            Status.OK,
            numerics=make_numerics(1.3e-2),
            measurement=make_measurement(2.37, seed=1),
            seconds=9.0,
        ),
        Trial(
            Candidate((COMPILE,)),
            Status.OK,
            numerics=make_numerics(3.1e-7),
            measurement=make_measurement(1.004, seed=2, peak=171 << 20, compile_seconds=21.0),
            notes=("graph break at examples/minilm.py:42: print()",),
            seconds=31.0,
        ),
        Trial(
            Candidate((THREADS,)),
            Status.OK,
            numerics=make_numerics(0.0),
            measurement=make_measurement(0.94, seed=3, peak=176 << 20),
        ),
        Trial(
            Candidate((INT8,)),
            Status.WRONG,
            "error 8.2e-2 is above the 2.0e-2 allowed",
            numerics=make_numerics(8.2e-2),
            measurement=make_measurement(2.41, seed=4),
        ),
        Trial(
            Candidate((INT8_WEIGHT,)),
            Status.WRONG,
            "error 4.0e-2 is above the 2.0e-2 allowed",
            numerics=make_numerics(4.0e-2),
        ),
        Trial(
            Candidate((BF16, THREADS)),
            Status.OK,
            numerics=make_numerics(1.3e-2),
            measurement=make_measurement(2.29, seed=5),
        ),
        Trial(
            best,
            Status.OK,
            "fastest of those inside the error budget",
            numerics=make_numerics(1.1e-2),
            measurement=make_measurement(2.81, seed=6, compile_seconds=22.4),
            layers_ms=layers,
        ),
        Trial(Candidate((BF16, REDUCE)), Status.FAILED, "died by signal 11 (segmentation fault)", isolation="process"),
        Trial(Candidate((AOT,)), Status.TIMEOUT, "no result within 180 s"),
        Trial(Candidate((INT8, COMPILE)), Status.OOM, "took more than 12.8 GiB"),
        Trial(
            best,
            Status.OK,
            "fastest of those inside the error budget",
            numerics=make_numerics(1.1e-2),
            measurement=make_measurement(2.84, seed=7, pairs=80, peak=98 << 20, compile_seconds=22.4),
            phase="confirm",
            layers_ms=layers,
        ),
    )


def make_plan(
    *,
    name: str = "all-MiniLM-L6-v2",
    trials: tuple[Trial, ...] | None = None,
    chosen: Trial | None = None,
    mode: Mode = Mode.INFERENCE,
    verified: bool = True,
    **changes: object,
) -> Plan:
    """Return a plan in which bf16 and compile won; pass `trials` and `chosen` for another story."""
    evidence = won_trials() if trials is None else trials
    plan = Plan(
        device=make_device(verified=verified),
        workload=make_spec(name, mode),
        chosen=chosen or evidence[-1],
        evidence=evidence,
        skipped=(
            Skipped("float8", "this CPU has no FP8 units", ""),
            Skipped("tf32", "only NVIDIA GPUs from Ampere on have TF32", "run on such a GPU"),
        ),
        untried=(
            Untried(Candidate((BF16, AOT)), "the budget of 240 s was spent"),
            Untried(Candidate((THREADS, COMPILE)), "predicted at most 1.35x, below the 2.81x already found"),
        ),
        prediction=make_prediction(),
        config={
            "mode": str(mode),
            "budget_s": 240.0,
            "max_error": 2e-2,
            "min_gain": 0.02,
            "only": [],
            "memory_limit_bytes": None,
        },
        created="2026-01-15T10:24:31+00:00",
        package_version="0.1.0",
        command="kpt optimize examples/minilm.py:workload -o out/minilm",
        search_seconds=214.0,
    )
    return replace(plan, **changes)  # type: ignore[arg-type]


def make_lost_plan() -> Plan:
    """Return a plan in which nothing won."""
    base = Trial(
        Candidate(),
        Status.OK,
        "nothing was reliably faster",
        measurement=make_measurement(1.0, seed=9, peak=176 << 20),
        phase="confirm",
    )
    kept = tuple(
        t for t in won_trials() if t.candidate in (Candidate((COMPILE,)), Candidate((THREADS,)), Candidate((AOT,)))
    )
    return make_plan(trials=(*kept, base), chosen=base)


def make_bare_plan() -> Plan:
    """Return the least plan there can be: nothing measured, nothing checked."""
    trials = (
        Trial(Candidate(), Status.OK),
        Trial(Candidate((BF16,)), Status.FAILED, "RuntimeError: not implemented for 'BFloat16'"),
        Trial(Candidate((COMPILE,)), Status.TIMEOUT, "no result within 180 s"),
        Trial(Candidate((INT8,)), Status.OOM, "took more than 12.8 GiB"),
    )
    return make_plan(
        trials=trials,
        chosen=trials[0],
        prediction=Prediction(0.0, 0.0, 0.0, 0.0, (), {}),
        untried=(),
        skipped=(),
        command="",
        search_seconds=0.0,
        verified=False,
    )


def make_crowded_plan() -> Plan:
    """Return a plan with everything that is hard to show: many trials, long names, no finite errors, slow ones."""
    trials = list(won_trials()[:-1])
    for index in range(24):
        steps = (
            Step(
                "compile", {"mode": f"max-autotune-no-cudagraphs-{index}", "dynamic": True, "regional": index % 2 == 0}
            ),
            BF16,
        )
        trials.append(
            Trial(
                Candidate(steps),
                Status.OK,
                numerics=make_numerics(10.0 ** (-index / 2 - 2)),
                measurement=make_measurement(0.2 + index * 0.1, seed=index, pairs=9, compile_seconds=4000.0 * index),
            )
        )
    broken = Check(
        "output.logits", Gate.PRECISION, math.nan, 2e-2, "not finite: 12 of 4096 values are NaN", "third call"
    )
    trials.append(
        Trial(
            Candidate((Step("dtype", {"dtype": "float16"}),)),
            Status.WRONG,
            numerics=NumericsReport((broken,)),
            measurement=make_measurement(3.9, seed=77),
        )
    )
    layers = {f"model.decoder.layers.{i}.self_attention_with_a_long_name": (5.0 + i, 3.0 + i / 2) for i in range(40)}
    chosen = replace(won_trials()[-1], layers_ms=layers)
    return make_plan(
        name="A model whose name is long: " + "very " * 20 + "long", trials=(*trials, chosen), chosen=chosen
    )
