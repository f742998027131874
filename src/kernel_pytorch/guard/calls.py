"""Two functions of one process take turns until the verdict is certain: what a test compares.

The order, the statistics and the looks are those of every other comparison (`measure.sampler.collect`,
`validation.regression.Sequential`); only the two processes are missing, so what both share (caches, the allocator,
global settings of torch) is shared, and each is called once, untimed, before its turn where it is short.
"""

from __future__ import annotations

import datetime as dt
import gc
import math
import platform
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kernel_pytorch.backends import manager_for
from kernel_pytorch.core.types import Verdict
from kernel_pytorch.errors import KptError
from kernel_pytorch.guard.types import Comparison, SideFacts
from kernel_pytorch.measure.sampler import _MAX_CALLS, _SAMPLE_MS, _ForeignLoad, _settled, collect
from kernel_pytorch.validation.regression import Judgement, Sequential

if TYPE_CHECKING:
    from kernel_pytorch.core.protocols import HardwareManager

__all__ = ["compare_calls"]

_COLD_MS = 20.0
"""A function shorter than this is called once, untimed, before it is timed: the other one had the caches."""
_MAX_WARM_UP = 24
_WARM_UP_SHARE = 0.25
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
    seed: int = 0,
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
        seed: Of the order in which turns are taken.

    Raises:
        KptError: Bad arguments.
        Exception: Whatever the functions raise, as it is.
    """
    if not max_seconds > 0.0 or max_pairs < 2:
        raise KptError(f"max_seconds must be above 0 and max_pairs at least 2, got {max_seconds} and {max_pairs}")
    began = time.monotonic()
    sequential = Sequential(max_slowdown, max_pairs)
    for fn in (base, head):
        fn()
    manager = manager_for(device or _device())
    sides = (_Timed(manager, base), _Timed(manager, head))
    series: tuple[list[float], list[float]] = ([], [])
    judged: Judgement | None = None

    def sample(i: int) -> float:
        series[i].append(sides[i].sample())
        return series[i][-1]

    def late() -> bool:
        nonlocal judged
        judged = sequential.look(*series)
        return judged is not None or time.monotonic() - began > max_seconds

    with manager.exclusive():
        warm_up = _warm_up(sides, began + _WARM_UP_SHARE * max_seconds)
        gc.collect()
        load = _ForeignLoad.now()
        collect(sample, min_pairs=2, max_pairs=max_pairs, confidence=0.95, late=late, seed=seed)
        foreign = _ForeignLoad.now().cores_since(load)
    judged = judged or sequential.look(*series, last=True)
    assert judged is not None
    telemetry = {"foreign_load_cores": foreign, "warm_up_calls": float(warm_up)}
    facts = [_facts(side, label, telemetry) for side, label in zip(sides, labels, strict=True)]
    notes = list(judged.notes)
    if foreign >= _BUSY_CORES:
        notes.append(f"other processes kept {foreign:.1f} cores busy meanwhile")
    comparison = Comparison(
        kind="compare",
        name=name,
        verdict=judged.verdict,
        reason=judged.reason,
        max_slowdown=max_slowdown,
        base=facts[0],
        head=facts[1],
        created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        id=uuid.uuid4().hex,
        change=judged.change,
        base_samples_ms=tuple(series[0]),
        head_samples_ms=tuple(series[1]),
        paired=True,
        notes=tuple(notes),
        command=command,
    )
    if profile and judged.verdict is Verdict.FAIL:
        comparison = _explained(comparison, sides)
    return replace(comparison, seconds=time.monotonic() - began)


class _Timed:
    """One function, and how many of its calls make a sample."""

    def __init__(self, manager: HardwareManager, fn: Callable[[], Any]) -> None:
        self.manager = manager
        self.fn = fn
        self.calls = 1
        self.shortest_ms = math.inf

    def once(self) -> float:
        """Return milliseconds of one call."""
        spent = self.manager.time_ms(self.fn)
        self.shortest_ms = min(self.shortest_ms, spent)
        return spent

    def sample(self) -> float:
        """Return milliseconds of one call, as the mean of several where it is short."""
        gc.collect(1)
        if self.shortest_ms < _COLD_MS:
            self.fn()
        was = gc.isenabled()
        gc.disable()
        try:
            return self.manager.time_ms(self.fn if self.calls == 1 else self._several) / self.calls
        finally:
            if was:
                gc.enable()

    def _several(self) -> Any:
        result = None
        for _ in range(self.calls):
            result = self.fn()
        return result


def _warm_up(sides: Sequence[_Timed], deadline: float) -> int:
    """Call both in turn until neither gets faster; the same number of calls makes a sample of either."""
    seen: tuple[list[float], list[float]] = ([], [])
    while len(seen[0]) < _MAX_WARM_UP:
        for side, times in zip(sides, seen, strict=True):
            times.append(side.once())
        if all(map(_settled, seen)) or (len(seen[0]) >= 2 and time.monotonic() > deadline):
            break
    shortest = min(side.shortest_ms for side in sides)
    calls = min(_MAX_CALLS, math.ceil(_SAMPLE_MS / shortest)) if shortest > 0.0 else _MAX_CALLS
    for side in sides:
        side.calls = calls
    return len(seen[0])


def _device() -> str:
    """Return the GPU where this process uses one by now, else the CPU."""
    torch = sys.modules.get("torch")
    return "auto" if torch is not None and torch.cuda.is_initialized() else "cpu"


def _facts(side: _Timed, label: str, telemetry: dict[str, float]) -> SideFacts:
    spec = side.manager.spec
    software = {**{k: str(v) for k, v in spec.software.items()}, "python": platform.python_version()}
    return SideFacts(
        label=label,
        python=sys.executable,
        software=dict(sorted(software.items())),
        device_key=spec.key,
        telemetry={**telemetry, "calls_per_sample": float(side.calls)},
        peak_bytes=side.manager.peak_bytes(side.fn),
    )


def _explained(comparison: Comparison, sides: Sequence[_Timed]) -> Comparison:
    """Return a slowdown with the profiles of both sides and what they say about its cause."""
    from kernel_pytorch.guard.culprit import find_culprits
    from kernel_pytorch.guard.profile import kernels_ms

    base, head = (dict(kernels_ms(side.fn, side.manager)) for side in sides)
    comparison = replace(
        comparison,
        base=replace(comparison.base, kernels_ms=base),
        head=replace(comparison.head, kernels_ms=head),
    )
    return replace(comparison, culprits=find_culprits(comparison))
