"""The nouns: plain frozen dataclasses over the standard library, so that a plan is data and nothing else.

`plan.schema` reads and writes these very classes as JSON; there is no second definition of a plan.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from kernel_pytorch.core.step_memory import StepMemory

__all__ = [
    "Candidate",
    "Check",
    "DeviceSpec",
    "Event",
    "Gate",
    "Listener",
    "Measurement",
    "Mode",
    "Numerics",
    "NumericsReport",
    "OperatorShare",
    "Plan",
    "Prediction",
    "Ratio",
    "Scalar",
    "Skip",
    "Skipped",
    "Status",
    "Step",
    "TensorSignature",
    "Trial",
    "Untried",
    "Verdict",
    "WorkloadSpec",
]

Scalar = bool | int | float | str

SCHEMA_VERSION = 1


class Mode(StrEnum):
    """What the workload does with the model."""

    INFERENCE = "inference"
    TRAINING = "training"


class Numerics(StrEnum):
    """What a transform may do to the numbers; decides which gates judge it."""

    EXACT = "exact"
    """The same operations in the same order."""
    REORDERED = "reordered"
    """The same mathematics, another order of floating-point operations."""
    LOWER_PRECISION = "lower_precision"
    """Another number format somewhere."""


class Status(StrEnum):
    """How a trial ended."""

    OK = "ok"
    WRONG = "wrong"
    FAILED = "failed"
    TIMEOUT = "timeout"
    OOM = "oom"


class Verdict(StrEnum):
    """What a guard says of a change."""

    PASS = "PASS"  # noqa: S105  a verdict, no secret
    """Not slower than allowed, and proven so."""
    FAIL = "FAIL"
    """Slower, and proven so."""
    INCONCLUSIVE = "INCONCLUSIVE"
    """The samples at hand do not decide, or could not be taken; the reason says why."""
    STALE = "STALE"
    """The plan was made with other software or on another device, so it is not judged."""
    WRONG = "WRONG"
    """The numbers differ by more than is allowed."""


class Gate(StrEnum):
    """Which part of the validation a check belongs to, in the order in which they are applied."""

    CONTRACT = "contract"
    """Structure, shape, dtype, finiteness and side effects of what ships."""
    STRUCTURE = "structure"
    """Structural steps at high precision and perturbed parameters."""
    KERNEL = "kernel"
    """Low-precision kernels against high-precision arithmetic on their own quantised operands."""
    PRECISION = "precision"
    """Error of what ships against the high-precision oracle."""
    TRAINING = "training"
    """Gradients and a short paired-seed loss curve of what ships."""


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """What the machine is: detected, never configured.

    Attributes:
        vendor: `cpu`, `nvidia`, `amd`, `intel` or `tpu`; names the package under `hardware` and `backends`.
        name: The marketing name, for people; nothing is decided by it.
        arch: `sm_90`, `x86_64-avx512_bf16`, `v5e` ...: what decides which code runs.
        memory_bytes: Memory of one device (for a CPU: of the machine).
        num_devices: Devices of this kind (for a CPU: physical cores usable by this process).
        features: What the device can do, e.g. `avx512_bf16`, `amx_bf16`, `fp8`, `cxx_compiler`.
        peak_flops: Floating-point operations a second by dtype name (`float32`, `bfloat16`, ...).
        bandwidth_bytes_per_s: Main-memory bandwidth.
        software: Versions of what decides the generated code: `torch`, `python`, `compiler`, `driver` ...
        sources: Where each peak rate comes from (`measured`, or a document), by field.
        verified: Whether the vendor's contract suite has been run on real hardware of this arch.
    """

    vendor: str
    name: str
    arch: str
    memory_bytes: int
    num_devices: int
    features: tuple[str, ...]
    peak_flops: Mapping[str, float]
    bandwidth_bytes_per_s: float
    software: Mapping[str, str]
    sources: Mapping[str, str] = field(default_factory=dict)
    verified: bool = False

    @property
    def key(self) -> str:
        """A file-system-safe identity of the hardware alone: two machines with one key should agree on a plan."""
        return f"{self.vendor}-{self.arch}-{self.num_devices}".replace("/", "_").replace(" ", "_")


@dataclass(frozen=True, slots=True)
class TensorSignature:
    """Shape and dtype of one tensor leaf of the inputs."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """What a transform may know of a workload before it sees the model.

    Attributes:
        name: For people.
        fingerprint: Hash of the structure: module classes, parameter and buffer names, shapes and dtypes.
        mode: Inference or training.
        signatures: Input tensor leaves of each case of the workload, by case name.
        weights: Share of the work each case stands for; sums to one.
        parameters: Number of parameters, tied ones once.
        parameter_bytes: Their bytes, tied ones once.
        buffer_bytes: Bytes of the buffers.
        dtypes: Dtypes of the floating-point parameters, most bytes first (`float32`, ...).
        modules: Instances by class name, e.g. `{"Linear": 36, "LayerNorm": 13}`.
        blocks: Classes of modules that repeat with the same structure, and how often (`{"BertLayer": 6}`).
        operators: Calls of each aten operator in one forward (and backward) of the first case.
        devices: Device types the parameters are on.
        in_memory: Whether the model was handed over as an object, so that it may not reach a worker.
    """

    name: str
    fingerprint: str
    mode: Mode
    signatures: Mapping[str, tuple[TensorSignature, ...]]
    weights: Mapping[str, float]
    parameters: int
    parameter_bytes: int
    buffer_bytes: int
    dtypes: tuple[str, ...]
    modules: Mapping[str, int]
    blocks: Mapping[str, int]
    operators: Mapping[str, int]
    devices: tuple[str, ...] = ("cpu",)
    in_memory: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One application of one transform: its name and parameters, sorted by name."""

    transform: str
    params: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", dict(sorted(self.params.items())))

    def __hash__(self) -> int:
        return hash((self.transform, tuple(self.params.items())))

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v}" for k, v in self.params.items())
        return f"{self.transform}({inner})" if inner else self.transform


@dataclass(frozen=True, slots=True)
class Candidate:
    """What could be done: steps in order of application; empty is the unmodified model."""

    steps: tuple[Step, ...] = ()

    @property
    def label(self) -> str:
        """One line for people."""
        return " + ".join(map(str, self.steps)) or "unmodified"

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True, slots=True)
class Skip:
    """Why something does not apply here, and what would change that."""

    reason: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A transform that proposed nothing."""

    transform: str
    reason: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Untried:
    """A candidate that was proposed and not tried."""

    candidate: Candidate
    reason: str


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison. Passes where `error <= budget`; a yes-or-no check has error 0.0 or `inf` and budget 0.0.

    Attributes:
        name: What was compared: `output[0]`, `grad encoder.weight`, `buffer bn.running_mean`, `dtype output.logits`.
        gate: The gate it belongs to.
        error: Relative error of the worst row, or the statistic that the detail names.
        budget: What was allowed.
        detail: What was wrong, in words; empty where it passed.
        case: The case of the workload or variation of the inputs it was seen at.
    """

    name: str
    gate: Gate
    error: float
    budget: float
    detail: str = ""
    case: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is inside the budget; NaN never is."""
        return self.error <= self.budget


@dataclass(frozen=True, slots=True)
class NumericsReport:
    """What the validator saw of one candidate.

    Attributes:
        checks: All comparisons, worst first within a gate.
        unchecked: What could not be checked, and why: one sentence each.
        diverged_at: The first layer (module path) whose output parts from the reference; empty if none was found.
        cosine: Smallest cosine similarity of an output to the oracle; 1.0 where nothing was comparable.
        noise: The unmodified model's own relative error between two runs; 0.0 for a deterministic model.
    """

    checks: tuple[Check, ...]
    unchecked: tuple[str, ...] = ()
    diverged_at: str = ""
    cosine: float = 1.0
    noise: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether at least one comparison was made, and every one is inside its budget."""
        return bool(self.checks) and all(c.passed for c in self.checks)

    @property
    def worst(self) -> Check | None:
        """The check that failed first in gate order, else the one nearest its budget."""
        failed = [c for c in self.checks if not c.passed]
        if failed:
            order = list(Gate)
            return min(failed, key=lambda c: order.index(c.gate))
        return max(self.checks, key=lambda c: c.error / c.budget if c.budget else 0.0, default=None)

    @property
    def max_rel_error(self) -> float:
        """Largest relative error of what ships against the oracle (gate `precision`); 0.0 without such a check."""
        return max((c.error for c in self.checks if c.gate is Gate.PRECISION), default=0.0)

    @property
    def budget(self) -> float:
        """The budget of the precision gate; 0.0 without such a check."""
        return max((c.budget for c in self.checks if c.gate is Gate.PRECISION), default=0.0)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Speed-up over the unmodified model with its interval: baseline time over candidate time, so above 1 is faster."""

    value: float
    low: float
    high: float
    confidence: float = 0.95


@dataclass(frozen=True, slots=True)
class Measurement:
    """Raw times. Sample i of both series was taken side by side (ABBA), so that drift hits both alike.

    Attributes:
        samples_ms: Milliseconds of one call (one step) of the candidate; a mix of cases is weighted already.
        baseline_samples_ms: The unmodified model's, interleaved with them.
        ratio: Paired speed-up with its interval.
        peak_bytes: Peak memory of one call, parameters included; `None` where the device cannot tell.
        baseline_peak_bytes: The unmodified model's.
        compile_seconds: Time until the candidate's first result, less one steady call.
        telemetry: Foreign load, clocks, power, temperature ..., by name with its unit.
    """

    samples_ms: tuple[float, ...]
    baseline_samples_ms: tuple[float, ...]
    ratio: Ratio
    peak_bytes: int | None = None
    baseline_peak_bytes: int | None = None
    compile_seconds: float = 0.0
    telemetry: Mapping[str, float] = field(default_factory=dict)

    @property
    def median_ms(self) -> float:
        """Median of the candidate's samples."""
        return statistics.median(self.samples_ms)

    @property
    def baseline_median_ms(self) -> float:
        """Median of the interleaved baseline's samples."""
        return statistics.median(self.baseline_samples_ms)

    @property
    def break_even_calls(self) -> int | None:
        """Calls after which the compile time has paid; `None` where it never does."""
        saved_ms = self.baseline_median_ms - self.median_ms
        return None if saved_ms <= 0 else round(self.compile_seconds * 1e3 / saved_ms)


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate, tried.

    Attributes:
        phase: `screen` (made the choice) or `confirm` (fresh samples after the choice).
        reason: Why it is not `ok`, or why it lost; filled by the search.
        isolation: `process`, or `none` where the model could not travel to a worker.
        notes: Graph breaks and recompilations by the user's source line, and what else is worth telling.
        layers_ms: Time by top-level module before and after, `{"encoder": (12.0, 4.1)}`; may be empty.
        seconds: What the trial cost.
        spent_s: On what: `start` (of a worker, until the trial begins there: imports, the model, inputs), `apply`,
            `first_calls` (compilation), `judge`, `measure`, `layers`; what was not reached is absent.
    """

    candidate: Candidate
    status: Status
    reason: str = ""
    numerics: NumericsReport | None = None
    measurement: Measurement | None = None
    phase: str = "screen"
    isolation: str = "process"
    notes: tuple[str, ...] = ()
    layers_ms: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    seconds: float = 0.0
    spent_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OperatorShare:
    """One class of operators of the unmodified model.

    Attributes:
        kind: `matmul`, `attention`, `convolution`, `normalization`, `elementwise`, `reduction`, `embedding`,
            `copy`, `optimizer`, `other` or `overhead` (time outside any operator).
        time_share: Share of the measured time; the shares sum to one.
        calls: Operator calls.
        flops: Floating-point operations, a multiply-add counted as two.
        bytes: Bytes read and written, each operator alone.
    """

    kind: str
    time_share: float
    calls: int
    flops: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What can be said before anything is tried.

    Attributes:
        baseline_ms: Measured time of the unmodified model.
        floor_ms: The roofline floor: no implementation at the model's own precision can be faster.
        flops: Of one call, or one training step.
        bytes: Least bytes moved: parameters, inputs and outputs once.
        shares: By operator class, largest time first.
        ceilings: Upper bound of the speed-up by step label (Amdahl's law over the classes the step touches).
        notes: In words: what limits this model.
    """

    baseline_ms: float
    floor_ms: float
    flops: float
    bytes: float
    shares: tuple[OperatorShare, ...]
    ceilings: Mapping[str, float]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """The outcome of a search, with all its evidence.

    Attributes:
        chosen: The trial that confirmed the choice on fresh samples; its candidate is what `apply` replays. An
            empty candidate keeps the unmodified model.
        evidence: Every trial, in the order they ran, the confirmations among them.
        skipped: Transforms that proposed nothing, with reason and fix.
        untried: Candidates that were proposed and not tried.
        config: The configuration as plain JSON values.
        command: The command line that reproduces the search.
        search_seconds: What the search took.
        memory: What the device's compiler says of the unmodified step, and of the chosen one where that is another;
            empty where the device has no compiler that can be asked.
    """

    device: DeviceSpec
    workload: WorkloadSpec
    chosen: Trial
    evidence: tuple[Trial, ...]
    skipped: tuple[Skipped, ...]
    untried: tuple[Untried, ...]
    prediction: Prediction
    config: Mapping[str, Scalar | list[str] | None]
    created: str
    package_version: str
    command: str = ""
    search_seconds: float = 0.0
    memory: tuple[StepMemory, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def candidate(self) -> Candidate:
        """What `apply` replays."""
        return self.chosen.candidate


@dataclass(frozen=True, slots=True)
class Event:
    """What a search tells while it runs.

    Attributes:
        kind: `detected`, `described`, `predicted`, `proposed`, `trial_started`, `trial_finished`, `note`, `chosen`.
        message: One line for people.
        trial: The finished trial.
        candidate: The candidate a trial started for.
        device: With `detected`.
        prediction: With `predicted`.
        elapsed_s: Since the search began.
        budget_s: What the search may take.
    """

    kind: str
    message: str = ""
    trial: Trial | None = None
    candidate: Candidate | None = None
    device: DeviceSpec | None = None
    prediction: Prediction | None = None
    elapsed_s: float = 0.0
    budget_s: float = 0.0


Listener = Callable[[Event], None]
