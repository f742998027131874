"""Two processes on one device take turns until the verdict is certain.

Both sides are loaded, called and warm before the first sample; while one is timed the other waits in a read. The
order is `measure.sampler.collect`'s: blocks of four, ABBA or BAAB by the toss of a coin, so that drift of the device
hits both alike. What one side's process does (crash, hang, raise) ends the run with what was sampled so far.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kernel_pytorch.guard.processes import SideFailed
from kernel_pytorch.guard.side_by_side import Limits, Runner, WorkerRunner
from kernel_pytorch.measure.sampler import ForeignLoad, calls_per_sample, collect, settled

__all__ = ["Run", "take_turns"]

_MAX_WARM_UP = 24
_WARM_UP_SHARE = 0.25


@dataclass(slots=True)
class Run:
    """What came of taking turns.

    Attributes:
        base_ms: Samples of the old side in time order, paired with those of the new one.
        head_ms: Samples of the new side.
        failure: Why it ended early, where a side failed.
        interrupted: Whether it was Ctrl-C (or SIGTERM) that ended it.
        foreign_load_cores: Mean number of cores that other processes kept busy meanwhile.
        warm_up_calls: Calls of each side before the first sample.
        seconds: What warm-up and sampling took.
    """

    base_ms: tuple[float, ...] = ()
    head_ms: tuple[float, ...] = ()
    failure: SideFailed | None = None
    interrupted: KeyboardInterrupt | SystemExit | None = None
    foreign_load_cores: float = 0.0
    warm_up_calls: int = 0
    seconds: float = 0.0


def take_turns(
    base: Runner,
    head: Runner,
    *,
    done: Callable[[Sequence[float], Sequence[float]], bool],
    limits: Limits,
    max_pairs: int,
    seed: int = 0,
) -> Run:
    """Warm both sides up, then sample them in turns until it is decided or time is up; both are loaded already.

    Args:
        base: The old side.
        head: The new side.
        done: Asked after each block of four with all pairs so far; True ends the sampling.
        limits: How long it may take.
        max_pairs: Pairs at most.
        seed: Of the order within the blocks.

    Returns:
        The samples; with `failure` where a side crashed, hung or raised meanwhile.
    """
    run, runners = Run(), (base, head)
    series: tuple[list[float], list[float]] = ([], [])
    began = time.monotonic()

    def sample(i: int) -> float:
        runner, other = runners[i], runners[1 - i]
        taken = runner.sample()
        if isinstance(runner, WorkerRunner) and isinstance(other, WorkerRunner):
            other.core = runner.core
        series[i].extend(taken)
        return statistics.median(taken)

    def late() -> bool:
        pairs = min(map(len, series))
        return (
            pairs >= max_pairs
            or time.monotonic() - began > limits.sampling
            or done(series[0][:pairs], series[1][:pairs])
        )

    load = ForeignLoad.now()
    try:
        workers = [runner for runner in runners if isinstance(runner, WorkerRunner)]
        run.warm_up_calls = _warm_up(workers, began + _WARM_UP_SHARE * limits.sampling, limits)
        gc.collect()
        load = ForeignLoad.now()
        collect(sample, min_pairs=2, max_pairs=max(2, max_pairs), confidence=0.95, late=late, seed=seed)
    except SideFailed as failure:
        run.failure = failure
    except (KeyboardInterrupt, SystemExit) as stop:
        run.interrupted, run.failure = stop, SideFailed("interrupted")
    run.foreign_load_cores = ForeignLoad.now().cores_since(load)
    run.seconds = time.monotonic() - began
    pairs = min(map(len, series))
    run.base_ms, run.head_ms = tuple(series[0][:pairs]), tuple(series[1][:pairs])
    return run


def _warm_up(workers: Sequence[WorkerRunner], deadline: float, limits: Limits) -> int:
    """Run workers in turn until none gets faster; choose how many calls make a sample, the same number for all.

    A command's process is new in every turn: it has nothing to warm up that its next invocation would find.
    """
    times: list[list[float]] = [[] for _ in workers]
    if not workers:
        return 0
    while len(times[0]) < _MAX_WARM_UP:
        for worker, seen in zip(workers, times, strict=True):
            seen.append(worker.warm_up(limits.hang))
        if all(map(settled, times)) or (len(times[0]) >= 2 and time.monotonic() > deadline):
            break
    for case in workers[0].call_ms:
        shortest = min(worker.call_ms[case] for worker in workers)
        calls = calls_per_sample(shortest)
        for worker in workers:
            worker.calls[case] = calls
            worker.call_ms[case] = shortest
    return len(times[0])
