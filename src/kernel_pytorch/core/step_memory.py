"""What a plan holds of memory that was found out without running anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["ModuleMemory", "StepMemory", "Whose"]


class Whose(StrEnum):
    """Whose memory it is."""

    UNMODIFIED = "unmodified"
    CHOSEN = "chosen"


@dataclass(frozen=True, slots=True)
class ModuleMemory:
    """What one module holds at the peak of a step."""

    module: str
    bytes: int


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Memory of one call or training step as the device's own compiler assigns it; nothing ran for it.

    Attributes:
        whose: Of the unmodified model, or of what the plan applies.
        place: What it was compiled for: `v5e:1`.
        case: Of the workload, the one with the largest inputs.
        fits: Whether it does; `None` where the compiler did not answer.
        peak_bytes: Most memory held at once on one device, arguments included; 0 where the compiler gave up.
        needed_bytes: Where it gave up, what it says was needed; else 0.
        capacity_bytes: Of one device.
        parts: Bytes of the peak by what they are: `parameters`, `optimizer`, `buffers`, `batch`, `temporaries`.
        modules: Temporaries at the peak by the module that made them, largest first; no more than ten.
        reason: Where it does not fit, the compiler's words; where there is no answer, why.
    """

    whose: Whose
    place: str
    case: str
    fits: bool | None = None
    peak_bytes: int = 0
    needed_bytes: int = 0
    capacity_bytes: int = 0
    parts: Mapping[str, int] = field(default_factory=dict)
    modules: tuple[ModuleMemory, ...] = ()
    reason: str = ""
