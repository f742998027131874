"""What the user asks for. A vendor fact is detected and a knob is searched, so neither is here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from kernel_pytorch.core.types import Mode, Scalar
from kernel_pytorch.errors import KptError

__all__ = ["BUDGETS_S", "GPU_BUDGETS_S", "KernelPyTorchConfig", "NvidiaWants", "TpuWants", "budget_seconds"]

BUDGETS_S: dict[str, float] = {"quick": 60.0, "default": 240.0, "thorough": 1800.0}
"""Seconds a search may take, confirmation included, by the name `--budget` accepts."""

GPU_BUDGETS_S: dict[str, float] = {"quick": 150.0, "default": 540.0, "thorough": 1800.0}
"""The same where compiling is what takes long: one compiled candidate of a training step of 2.8e9 parameters takes
77 s on an H200, and two of them and the confirmation come before the best is found."""


def budget_seconds(name: str, vendor: str) -> float:
    """Return the seconds that a named budget has on a device.

    Args:
        name: `quick`, `default` or `thorough`.
        vendor: As in `DeviceSpec.vendor`.
    """
    return (BUDGETS_S if vendor == "cpu" else GPU_BUDGETS_S)[name]


@dataclass(frozen=True, slots=True)
class NvidiaWants:
    """What only a user can want of NVIDIA GPUs.

    Attributes:
        allow_float8_lm_head: Whether the layer that makes logits may train in FP8.
    """

    allow_float8_lm_head: bool = False


@dataclass(frozen=True, slots=True)
class TpuWants:
    """What only a user can want of TPUs.

    Attributes:
        topology: Slice for which the TPU compiler is asked about the step's memory, on any machine: `v5e:4x4`, as `kpt
            fit` takes it. Empty: one chip of the device that was searched on, where that is a TPU.
    """

    topology: str = ""


@dataclass(frozen=True, slots=True)
class KernelPyTorchConfig:
    """What the user asks for.

    Attributes:
        mode: Inference or training.
        budget_s: Seconds the search may take, the confirmation on fresh samples included; `None`: the default of the
            device (`BUDGETS_S`, `GPU_BUDGETS_S`).
        max_error: Largest relative error of the worst output row against the high-precision oracle.
        min_gain: Smallest speed-up worth a changed model, as a fraction: 0.02 keeps the original below 1.02x.
        seed: Seed of inputs, perturbations and resampling.
        trial_timeout_s: Deadline of one trial.
        memory_limit_bytes: Memory one trial may take; `None` is 80 % of the machine's.
        isolation: `process` tries each candidate in a worker of its own; `none` tries in this process.
        only: Transforms to try; empty is all.
        exclude: Transforms not to try.
        outside: What an applied model does with inputs outside the workload: `original` runs and counts the
            unmodified model (which stays in memory for that), `error` raises.
        trust_remote_code: Whether code from a model hub may run.
        nvidia: What is wanted of NVIDIA GPUs; also as the names of what is allowed, as plans store it.
        tpu: What is wanted of TPUs; also as the name of a slice, as plans store it.

    Raises:
        KptError: A value out of range.
    """

    mode: Mode = Mode.INFERENCE
    budget_s: float | None = None
    max_error: float = 2e-2
    min_gain: float = 0.02
    seed: int = 0
    trial_timeout_s: float = 180.0
    memory_limit_bytes: int | None = None
    isolation: str = "process"
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    outside: str = "original"
    trust_remote_code: bool = False
    nvidia: NvidiaWants = NvidiaWants()
    tpu: TpuWants = TpuWants()

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", Mode(self.mode))
        for name in ("budget_s", "max_error", "trial_timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise KptError(f"{name} must be above 0, got {value!r}")
        if not 0.0 <= self.min_gain < 1.0:
            raise KptError(f"min_gain must be in [0, 1), got {self.min_gain!r}")
        if self.isolation not in ("process", "none"):
            raise KptError(f"isolation must be 'process' or 'none', got {self.isolation!r}")
        if self.outside not in ("original", "error"):
            raise KptError(f"outside must be 'original' or 'error', got {self.outside!r}")
        object.__setattr__(self, "nvidia", _wants(self.nvidia))
        object.__setattr__(self, "tpu", _tpu_wants(self.tpu))
        both = set(self.only) & set(self.exclude)
        if both:
            raise KptError(f"transforms both in only and exclude: {', '.join(sorted(both))}")

    @classmethod
    def for_inference(cls, **changes: Any) -> KernelPyTorchConfig:
        """Optimise forward calls; the default."""
        return cls(**{"mode": Mode.INFERENCE, **changes})

    @classmethod
    def for_training(cls, **changes: Any) -> KernelPyTorchConfig:
        """Optimise whole training steps, with gradients and a loss curve checked."""
        return cls(**{"mode": Mode.TRAINING, **changes})

    @classmethod
    def for_production(cls, **changes: Any) -> KernelPyTorchConfig:
        """Search thoroughly, ask for half the error, and change a model only for a gain of 5 % or more."""
        base = {"budget_s": BUDGETS_S["thorough"], "max_error": 1e-2, "min_gain": 0.05}
        return cls(**{**base, **changes})

    def on(self, vendor: str) -> KernelPyTorchConfig:
        """Return the configuration with what is left to the device filled in."""
        return self if self.budget_s is not None else self.but(budget_s=budget_seconds("default", vendor))

    def but(self, **changes: Any) -> KernelPyTorchConfig:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def as_json(self) -> dict[str, Scalar | list[str] | None]:
        """Return the fields as plain JSON values, as a plan stores them."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        allowed = [name for name, wanted in asdict(self.nvidia).items() if wanted]
        return {**plain, "nvidia": allowed, "tpu": self.tpu.topology}


def _wants(given: Any) -> NvidiaWants:
    """Return what is wanted, given as such or as the names of what is allowed."""
    if isinstance(given, NvidiaWants):
        return given
    names, known = tuple(given), [field.name for field in fields(NvidiaWants)]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise KptError(f"nvidia: unknown {', '.join(map(repr, unknown))}", fix=f"known: {', '.join(known)}")
    return NvidiaWants(**dict.fromkeys(names, True))


def _tpu_wants(given: Any) -> TpuWants:
    """Return what is wanted, given as such or as the name of a slice."""
    return given if isinstance(given, TpuWants) else TpuWants(topology=str(given))
