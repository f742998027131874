"""Records where the time of one call goes, by kernel on a GPU and by operator on a CPU.

The worker of a side runs this file by its path, in environments whose `kernel_pytorch` may be older than it: it
imports torch and nothing of the package. `kernel_names.condensed` reads what it records.
"""

from __future__ import annotations

import collections
import gc
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    from kernel_pytorch.core.protocols import HardwareManager

__all__ = ["OUTSIDE", "kernels_ms", "profile_in_turns"]

OUTSIDE = "outside operators"
"""On a CPU, the time of a call that no operator takes: Python, data, waiting."""

_INSIDE = " > "
_LEAST_MS = 1e-4
_QUIET = 4
_APART_SIGMAS = 2.3


def kernels_ms(
    call: Callable[[], Any],
    manager: HardwareManager,
    *,
    min_calls: int = 1,
    max_calls: int = 6,
    max_seconds: float = 1.0,
) -> dict[str, float]:
    """Profile calls one by one and return the milliseconds of one call by kernel or operator, longest first.

    Each figure is the lower quartile over the calls: what else runs on the machine only adds. On a GPU they are the
    kernels' own times; where kernels overlap, the time is shared among them, so that the sum is how long the GPU was
    busy, and what the step takes beyond it is spent between kernels. On a CPU they are operators' times without what
    they call, and the rest of the call's time (`OUTSIDE`), so that the sum is the call's, profiler included.

    Args:
        call: One call (step), warmed up: what it compiles or tunes would be in its time.
        manager: Of the device that it runs on.
        min_calls: Calls that are profiled in any case, after one that is profiled and thrown away.
        max_calls: Calls at most.
        max_seconds: No further call is begun after so long.

    Returns:
        Time by path: the optimizer's step and the operators that the kernel or operator ran inside, outermost
        first, then its own name, joined by ` > `. In the backward pass an operator of the forward is named with
        ` backward`. Empty where the device's profiler tells of no kernel.

    Raises:
        RuntimeError: Another profiler runs already.
    """
    on_gpu = manager.vendor != "cpu"
    begin = time.monotonic()
    calls: list[dict[str, float]] = []
    while len(calls) <= max_calls:
        calls.append(_profiled(call, manager, on_gpu=on_gpu))
        if len(calls) > min_calls and time.monotonic() - begin > max_seconds:
            break
    kept = calls[1:]
    names = {name for one in kept for name in one}
    quiet = {name: sorted(one.get(name, 0.0) for one in kept)[len(kept) // _QUIET] for name in names}
    return dict(sorted(((n, ms) for n, ms in quiet.items() if ms >= _LEAST_MS), key=lambda item: -item[1]))


def profile_in_turns(
    base: Callable[[], Mapping[str, float]], head: Callable[[], Mapping[str, float]], *, rounds: int = 2
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the profiles of two sides from several that were taken in turns (ABBA).

    Two profiles that are taken one after the other differ by what the machine did meanwhile. Of each kernel the least
    time counts, as what disturbs only adds; and where its times on one side lie among those on the other, both sides
    get the same: it did not move, as far as can be seen.

    Args:
        base: Takes a short profile of the old side: `kernels_ms`, in this process or in the side's own.
        head: Of the new side.
        rounds: Blocks of four, at least two: fewer times of a kernel than four a side prove nothing.
    """
    taken: tuple[list[Mapping[str, float]], list[Mapping[str, float]]] = ([], [])
    for i in (0, 1, 1, 0) * rounds:
        taken[i].append((base, head)[i]())
    sides: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for name in dict.fromkeys(name for one in (*taken[0], *taken[1]) for name in one):
        times = [[one[name] for one in profiles if name in one] for profiles in taken]
        told = [min(one) if len(one) > rounds else 0.0 for one in times]  # in most of them, or by chance
        if all(told) and not _apart(*times):
            told = [min(told)] * 2
        for side, ms in zip(sides, told, strict=True):
            if ms > 0.0:
                side[name] = ms
    return tuple(dict(sorted(side.items(), key=lambda item: -item[1])) for side in sides)  # type: ignore[return-value]


def _apart(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether two handfuls of times differ: Mann and Whitney's test at 2 %, of four each none may overlap."""
    n, m = len(one), len(other)
    above = sum((a > b) + 0.5 * (a == b) for a in one for b in other)
    return abs(above - n * m / 2.0) >= _APART_SIGMAS * math.sqrt(n * m * (n + m + 1) / 12.0)


def _profiled(call: Callable[[], Any], manager: HardwareManager, *, on_gpu: bool) -> dict[str, float]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch tells of each start and stop on stderr
    accelerator = ProfilerActivity.XPU if manager.vendor == "intel" else ProfilerActivity.CUDA
    activities = [ProfilerActivity.CPU, *([accelerator] if on_gpu else [])]
    manager.synchronize()
    collects = gc.isenabled()
    gc.disable()
    try:
        with profile(activities=activities, acc_events=True) as recorded:
            begin = time.perf_counter()
            call()
            manager.synchronize()
            wall_ms = (time.perf_counter() - begin) * 1e3
    finally:
        if collects:
            gc.enable()
    events = list(recorded.events() or [])
    if on_gpu:
        return _on_gpu(events)
    found = _on_cpu(events)
    return {**found, OUTSIDE: max(0.0, wall_ms - sum(found.values()))}


def _on_gpu(events: Sequence[Any]) -> dict[str, float]:
    host: Any = torch._C._autograd.DeviceType.CPU  # noqa: SLF001  how the events name it
    launched: dict[tuple[str, float], list[str]] = collections.defaultdict(list)
    for event, path in _paths(e for e in events if e.device_type == host):
        for kernel in event.kernels:
            launched[kernel.name, kernel.duration].append(_INSIDE.join((*path, _closed(kernel.name))))
    kernels = [
        (e.time_range.start, e.time_range.end, e.name)
        for e in events
        if e.device_type != host and not e.is_user_annotation and e.time_range.end > e.time_range.start
    ]
    time_us: dict[str, float] = collections.defaultdict(float)
    for (start, end, name), busy_us in zip(kernels, _shared(kernels), strict=True):
        paths = launched.get((name, end - start))
        time_us[paths.pop() if paths else _closed(name)] += busy_us
    return {name: us / 1e3 for name, us in time_us.items()}


def _shared(kernels: Sequence[tuple[float, float, str]]) -> list[float]:
    """Return each kernel's time, an instant in which k of them run counting 1/k for each."""
    marks = [(start, 1, i) for i, (start, _, _) in enumerate(kernels)]
    marks += [(end, 0, i) for i, (_, end, _) in enumerate(kernels)]
    own = [0.0] * len(kernels)
    running: set[int] = set()
    last = 0.0
    for at, begins, i in sorted(marks):
        for j in running:
            own[j] += (at - last) / len(running)
        last = at
        if begins:
            running.add(i)
        else:
            running.discard(i)
    return own


def _on_cpu(events: Iterable[Any]) -> dict[str, float]:
    time_us: dict[str, float] = collections.defaultdict(float)
    for event, path in _paths(events):
        if event.self_cpu_time_total > 0 and not event.is_user_annotation:
            own = () if path and path[-1] == event.name else (event.name,)
            time_us[_INSIDE.join((*path, *own))] += event.self_cpu_time_total
    return {name: us / 1e3 for name, us in time_us.items()}


def _paths(events: Iterable[Any]) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Give events of the host, in the order in which they began, with the operators that each is part of."""
    forward: dict[int, tuple[str, ...]] = {}
    for event in events:
        path = _path(event, forward)
        if event.sequence_nr >= 0 and _is_operator(event.name):
            forward[event.sequence_nr] = path  # the last one of a number is what made the node
        yield event, path


def _path(event: Any, forward: dict[int, tuple[str, ...]]) -> tuple[str, ...]:
    path: list[str] = []
    one = event
    while one is not None:
        if one.name.startswith("Optimizer.step#"):
            path.append(one.name.removeprefix("Optimizer.step#"))
        elif _is_operator(one.name):
            path.append(one.name)
        elif one.sequence_nr >= 0 and _is_node(one.name):
            path += [f"{name} backward" for name in reversed(forward.get(one.sequence_nr, ()))]
            break
        one = one.cpu_parent
    return tuple(reversed(path))


def _closed(kernel: str) -> str:
    """Return a name without blanks between closing brackets, so that none looks like the end of a path's part."""
    return kernel.replace(" >", ">")


def _is_operator(name: str) -> bool:
    return "::" in name and "autograd::" not in name


def _is_node(name: str) -> bool:
    """Return whether an event is a node of the autograd graph (`AddmmBackward0`, `MyFunctionBackward`)."""
    return name.rstrip("0123456789").endswith("Backward")
