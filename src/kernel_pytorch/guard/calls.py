"""Two functions of one process take turns until the verdict is certain: what a test compares.

The engine is that of every other comparison (`measure.sampler.compare`, `validation.regression.Sequential`); only the
two processes are missing, so what both functions share (caches, the allocator, global settings of torch) is shared.
"""

from __future__ import annotations

import datetime as dt
import functools
import platform
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kernel_pytorch.backends import manager_for
from kernel_pytorch.core.types import Verdict
from kernel_pytorch.errors import KptError
from kernel_pytorch.guard.types import Comparison, SideFacts
from kernel_pytorch.measure.sampler import compare
from kernel_pytorch.validation.regression import Sequential

if TYPE_CHECKING:
    from kernel_pytorch.core.protocols import HardwareManager

__all__ = ["compare_calls"]

_BUSY_CORES = 0.25


def compare_calls(
    base: Callable[[], Any],
    head: Callable[[], Any],
    *,
    name: str,
    max_slowdown: float = 0.03,
    max_seconds: float = 60.0,
    max_pairs: int = 400,
    labels: tuple[str, str] = ("base", "head"),
    device: str = "",
    profile: bool = True,
    command: str = "",
) -> Comparison:
    """Call two functions in turns until it is certain whether the second is slower.

    Args:
        base: One call of the old way, without arguments; its result is dropped.
        head: One call of the new way. Both should do the same work; nothing here compares what they return.
        name: What is compared, stable over time.
        max_slowdown: The smallest slowdown that matters, as a fraction.
        max_seconds: Limit of warm-up and sampling together; one block of four always runs.
        max_pairs: Pairs of samples at most.
        labels: What the sides are called.
        device: Where they run, as `manager_for` takes it; empty is the GPU where the functions use one, else the CPU.
        profile: Whether both are profiled where head turned out slower.
        command: What reproduces it.

    Raises:
        KptError: Bad arguments.
        Exception: Whatever the functions raise, as it is.
    """
    if not max_seconds > 0.0 or max_pairs < 2:
        raise KptError(f"max_seconds must be above 0 and max_pairs at least 2, got {max_seconds} and {max_pairs}")
    began = time.monotonic()
    judge = Sequential(max_slowdown, max_pairs)
    for fn in (base, head):
        fn()
    manager = manager_for(device or _device())
    measured = compare(
        manager,
        base,
        head,
        max_seconds=max_seconds,
        min_pairs=judge.looks[0] if judge.looks else max_pairs,
        max_pairs=max_pairs,
        confidence=judge.early_confidence,
        stop=judge.stop,
    )
    judged = judge.last(measured.baseline_samples_ms, measured.samples_ms)
    telemetry = dict(measured.telemetry)
    calls = telemetry.pop("calls_per_sample"), telemetry.pop("baseline_calls_per_sample")
    notes = list(judged.notes)
    if (foreign := telemetry["foreign_load_cores"]) >= _BUSY_CORES:
        notes.append(f"other processes kept {foreign:.1f} cores busy meanwhile")
    comparison = Comparison(
        kind="compare",
        name=name,
        verdict=judged.verdict,
        reason=judged.reason,
        max_slowdown=max_slowdown,
        base=_facts(manager, labels[0], {**telemetry, "calls_per_sample": calls[1]}, measured.baseline_peak_bytes),
        head=_facts(manager, labels[1], {**telemetry, "calls_per_sample": calls[0]}, measured.peak_bytes),
        created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        id=uuid.uuid4().hex,
        change=judged.change,
        base_samples_ms=measured.baseline_samples_ms,
        head_samples_ms=measured.samples_ms,
        paired=True,
        notes=tuple(notes),
        command=command,
    )
    if profile and judged.verdict is Verdict.FAIL:
        comparison = _explained(comparison, manager, base, head)
    return replace(comparison, seconds=time.monotonic() - began)


def _device() -> str:
    """Return the GPU where this process uses one by now, else the CPU."""
    torch = sys.modules.get("torch")
    return "auto" if torch is not None and torch.cuda.is_initialized() else "cpu"


def _facts(manager: HardwareManager, label: str, telemetry: dict[str, float], peak_bytes: int | None) -> SideFacts:
    spec = manager.spec
    software = {**{k: str(v) for k, v in spec.software.items()}, "python": platform.python_version()}
    return SideFacts(
        label=label,
        python=sys.executable,
        software=dict(sorted(software.items())),
        device_key=spec.key,
        telemetry=telemetry,
        peak_bytes=peak_bytes,
    )


def _explained(
    comparison: Comparison, manager: HardwareManager, base: Callable[[], Any], head: Callable[[], Any]
) -> Comparison:
    """Return a slowdown with the profiles of both sides and what they say about its cause."""
    from kernel_pytorch.guard.culprit import find_culprits
    from kernel_pytorch.guard.kernel_names import condensed
    from kernel_pytorch.guard.profile import kernels_ms, profile_in_turns

    old, new = profile_in_turns(*(functools.partial(kernels_ms, fn, manager) for fn in (base, head)))
    comparison = replace(
        comparison,
        base=replace(comparison.base, kernels_ms=condensed(old)),
        head=replace(comparison.head, kernels_ms=condensed(new)),
    )
    return replace(comparison, culprits=find_culprits(comparison))
