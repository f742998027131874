"""What a question of fit is answered with, whichever device and way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from kernel_pytorch.backends.tpu.buffers import Buffer
from kernel_pytorch.backends.tpu.steps import Argument, Role
from kernel_pytorch.core.types import Mode
from kernel_pytorch.fit.roofline import StepPrediction

__all__ = ["Fit", "How", "ModuleBytes", "by_module", "parts_of"]

_PARTS = {Role.PARAMETER: "parameters", Role.OPTIMIZER: "optimizer", Role.BUFFER: "buffers", Role.BATCH: "batch"}


class How(StrEnum):
    """How the memory was found out."""

    COMPILED = "compiled"
    """By the device's own compiler, without the device."""
    MEASURED = "measured"
    """On the device."""
    ESTIMATED = "estimated"
    """From the traced graph, as an eager run would hold it."""


@dataclass(frozen=True, slots=True)
class ModuleBytes:
    """What one module holds at the peak."""

    module: str
    bytes: int
    buffers: int


@dataclass(frozen=True, slots=True)
class Fit:
    """Memory and cost of one step.

    Attributes:
        name: Of the target.
        device: `tpu`, `cuda` or `cpu`.
        place: The topology, or the device's name.
        how: How the memory was found out.
        batch: Size of the first dimension of the inputs; 0 where they have none.
        chips: That the step runs on.
        fits: Whether it does; `None` where the device's memory is not known.
        message: The compiler's own words where it does not fit.
        peak_bytes: Most memory held at once on one device, arguments included; 0 where the compiler gave up.
        assigned_bytes: What the compiler sets aside, holes between buffers included: more than the peak where it splits
            a program over devices. 0 where it is not known.
        needed_bytes: Where the compiler gave up, what it says was needed; else 0.
        capacity_bytes: Of one device; 0 where it is not known.
        parts: Bytes of the peak by what they are: `parameters`, `optimizer`, `buffers`, `batch`, `temporaries`.
        buffers: The largest at the peak.
        modules: Temporaries at the peak by the module that made them, largest first.
        flops: Of one step on all chips together, by PyTorch's own formulas.
        bytes_accessed: Of memory, by the compiler's own count; 0 where there is no compiler.
        collectives: Bytes by kind.
        prediction: Of the step's time; `None` where the device's rates are not known.
        seconds: What finding out took, by part.
        software: Versions that had a part in it.
        notes: What a reader should know.
        verified: Whether it was seen on hardware.
    """

    name: str
    device: str
    place: str
    how: How
    mode: Mode
    batch: int
    chips: int = 1
    fits: bool | None = None
    message: str = ""
    peak_bytes: int = 0
    assigned_bytes: int = 0
    needed_bytes: int = 0
    capacity_bytes: int = 0
    parts: Mapping[str, int] = field(default_factory=dict)
    buffers: tuple[Buffer, ...] = ()
    modules: tuple[ModuleBytes, ...] = ()
    flops: int = 0
    flops_by_operator: Mapping[str, int] = field(default_factory=dict)
    bytes_accessed: float = 0.0
    collectives: Mapping[str, int] = field(default_factory=dict)
    prediction: StepPrediction | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    software: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    verified: bool = False


def by_module(buffers: Iterable[Buffer]) -> tuple[ModuleBytes, ...]:
    """Return the bytes of temporaries by the module that made them, largest first."""
    sizes: dict[str, int] = defaultdict(int)
    counts: dict[str, int] = defaultdict(int)
    for buffer in buffers:
        if buffer.kind != "argument":
            sizes[buffer.module] += buffer.bytes
            counts[buffer.module] += 1
    order = sorted(sizes, key=lambda module: (-sizes[module], module))
    return tuple(ModuleBytes(module, sizes[module], counts[module]) for module in order)


def parts_of(arguments: Iterable[Argument], padded: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return the bytes of a step's arguments by what they are; parts that are empty are left out.

    Args:
        arguments: Of the step.
        padded: What an argument takes in memory by its name, where that is known.
    """
    parts = dict.fromkeys(_PARTS.values(), 0)
    for argument in arguments:
        parts[_PARTS[argument.role]] += (padded or {}).get(argument.name, argument.bytes)
    return {name: size for name, size in parts.items() if size}
