"""What a guarded comparison is: plain data, stored in the history and rendered by every report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kernel_pytorch.core.types import Ratio, Verdict

__all__ = ["Comparison", "Culprit", "SideFacts"]


@dataclass(frozen=True, slots=True)
class SideFacts:
    """What one side of a comparison was, as its own process tells it.

    Attributes:
        label: `base`, `head`, `unmodified` or `plan`, or what the user called it.
        revision: Full commit of the code under test; empty where there is none.
        dirty: Whether the worktree had changes that no commit holds.
        python: Path of the interpreter that ran it.
        software: Versions by name: `python`, `torch`, `triton`, `cuda`, `cudnn`, `driver`, `kernel_pytorch`, ...
        device_key: `DeviceSpec.key`; empty for a command that only prints samples.
        fingerprint: Of the model (structure, shapes, dtypes); empty where no model was seen.
        telemetry: Clocks, power, temperature, foreign load, by name with its unit; medians over the run.
        kernels_ms: Time by kernel or operator for one call, where a profile was taken; may be empty.
        peak_bytes: Peak memory of one call; `None` where the device cannot tell.
    """

    label: str
    revision: str = ""
    dirty: bool = False
    python: str = ""
    software: Mapping[str, str] = field(default_factory=dict)
    device_key: str = ""
    fingerprint: str = ""
    telemetry: Mapping[str, float] = field(default_factory=dict)
    kernels_ms: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Culprit:
    """One thing that differs between the sides and may explain a slowdown.

    Attributes:
        kind: `revision`, `software`, `clocks`, `load`, `kernels`, `idle`, `memory`, `recompilation`, `device` or
            `unknown`.
        what: One line for people: `torch 2.12.1 -> 2.13.0`, `flash_fwd_kernel +1.8 ms (61 % of the slowdown)`.
        share: Share of the slowdown it explains, where that can be told.
        evidence: Figures behind it, by name with unit.
    """

    kind: str
    what: str
    share: float | None = None
    evidence: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One run of the guard: two sides, their samples, and what they say.

    Attributes:
        kind: `check` (a plan against the unmodified model) or `compare` (two revisions, environments, targets, series).
        name: What was compared, stable over time: history and trends group by it.
        verdict: See `Verdict`.
        reason: One sentence that gives the ground of the verdict.
        max_slowdown: Largest slowdown that is allowed, as a fraction.
        change: Time of head over time of base with its interval: 1.03 is 3 % slower. `None` without samples.
        base: The old side, or the unmodified model.
        head: The new side, or the model with its plan.
        base_samples_ms: In time order.
        head_samples_ms: In time order; sample i was taken beside sample i of base where `paired`.
        paired: Whether the sides took turns.
        notes: What else is worth telling: noisier, drift, foreign load, numerics.
        culprits: Most likely first; empty unless it failed.
        created: UTC, ISO 8601 with seconds.
        command: What reproduces it.
        seconds: What the run took.
        id: Unique; given when it is made, so that a run that is stored twice is stored once.
    """

    kind: str
    name: str
    verdict: Verdict
    reason: str
    max_slowdown: float
    base: SideFacts
    head: SideFacts
    created: str
    id: str
    change: Ratio | None = None
    base_samples_ms: tuple[float, ...] = ()
    head_samples_ms: tuple[float, ...] = ()
    paired: bool = True
    notes: tuple[str, ...] = ()
    culprits: tuple[Culprit, ...] = ()
    command: str = ""
    seconds: float = 0.0
