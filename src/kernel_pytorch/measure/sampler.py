"""Times two functions side by side until their difference is known.

The order within a block of four is ABBA or BAAB by the toss of a coin. ABBA cancels linear drift; the coin is for
interference with a period of its own: with plain ABBA the 95 % intervals covered 92 % of resampled H100 training
steps, with the coin 96 % (`benchmarks/interval_coverage.py`).
"""

from __future__ import annotations

import gc
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kernel_pytorch.core.types import Measurement, Ratio
from kernel_pytorch.measure.stats import paired_ratio

if TYPE_CHECKING:
    from kernel_pytorch.core.protocols import HardwareManager

__all__ = ["ForeignLoad", "calls_per_sample", "collect", "compare", "settled"]

_SAMPLE_MS = 5.0
"""A sample of a shorter function is the mean of as many calls as fill this."""
_MAX_CALLS = 1000
_WARM_UP_SHARE = 0.25
_MAX_WARM_UP = 24
_SETTLED = 0.05
_LOOK_GROWTH = 1.4


@contextmanager
def _no_gc() -> Iterator[None]:
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@dataclass(slots=True)
class _Series:
    """One function, and how many of its calls make a sample."""

    manager: HardwareManager
    fn: Callable[[], Any]
    calls: int = 1

    def _repeat(self) -> Any:
        result = None
        for _ in range(self.calls):
            result = self.fn()
        return result

    def sample(self) -> float:
        """Return milliseconds of one call."""
        with _no_gc():
            return self.manager.time_ms(self.fn if self.calls == 1 else self._repeat) / self.calls


def calls_per_sample(ms: float) -> int:
    """Return how many calls make a sample of a function that takes so long: short ones are not told by one call."""
    return min(_MAX_CALLS, math.ceil(_SAMPLE_MS / ms)) if ms > 0.0 else _MAX_CALLS


def settled(times: list[float]) -> bool:
    """Return whether times of a warm-up no longer fall: the last two are not below the least before by 5 % or more."""
    if len(times) < 4:
        return False
    return min(times[-2:]) >= (1.0 - _SETTLED) * min(times[:-2])


def _warm_up(series: tuple[_Series, _Series], deadline: float) -> int:
    """Run both in turn until neither gets faster, and choose how many calls make a sample; return the calls made."""
    times: tuple[list[float], list[float]] = ([], [])
    calls = 0
    while calls < 2 * _MAX_WARM_UP:
        for one, seen in zip(series, times, strict=True):
            seen.append(one.sample())
            calls += 1
        if all(map(settled, times)) or (calls >= 4 and time.monotonic() > deadline):
            break
    for one, seen in zip(series, times, strict=True):
        # Of calls in a row, a lazy runtime would compute the last one's result alone.
        one.calls = 1 if getattr(one.manager, "lazy", False) else calls_per_sample(min(seen))
    return calls


@dataclass(slots=True)
class ForeignLoad:
    """CPU time taken since the machine began: two of them tell how many cores other processes kept busy meanwhile.

    Attributes:
        wall: Seconds of a clock.
        busy: Seconds of CPU time of all processes.
        own: Seconds of CPU time of this process and its children.
    """

    wall: float = 0.0
    busy: float = 0.0
    own: float = 0.0

    @classmethod
    def now(cls) -> ForeignLoad:
        """Return what has been taken by now, by everybody and by this process with its children."""
        import psutil

        total = psutil.cpu_times()
        idle = total.idle + getattr(total, "iowait", 0.0) + getattr(total, "guest", 0.0)
        busy = sum(total) - idle - getattr(total, "guest_nice", 0.0)
        own = sum(os.times()[:4])
        for child in psutil.Process().children(recursive=True):
            try:
                spent = child.cpu_times()
            except psutil.Error:
                continue
            own += spent.user + spent.system
        return cls(time.monotonic(), busy, own)

    def cores_since(self, before: ForeignLoad) -> float:
        """Return the mean number of cores that others kept busy since then."""
        wall = max(1e-3, self.wall - before.wall)
        return max(0.0, (self.busy - before.busy) - (self.own - before.own)) / wall


def collect(
    sample: Callable[[int], float],
    *,
    min_pairs: int,
    max_pairs: int,
    confidence: float,
    stop: Callable[[Ratio], bool] | None = None,
    late: Callable[[], bool] = lambda: False,
    seed: int = 0,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Take samples in blocks of four, ABBA or BAAB, until told to stop; the schedule of `compare` without a clock.

    Args:
        sample: `sample(0)` returns one time of the baseline, `sample(1)` one of the candidate.
        min_pairs: As in `compare`.
        max_pairs: As in `compare`.
        confidence: As in `compare`.
        stop: As in `compare`.
        late: Whether time is up; asked after each block.
        seed: Of the order within the blocks.

    Returns:
        Times of the baseline and of the candidate, an even number of pairs, at least two.
    """
    coin = random.Random(seed)  # noqa: S311  an order of measurements
    times: tuple[list[float], list[float]] = ([], [])
    next_look = max(2, min_pairs)
    while True:
        first = coin.randrange(2)
        for i in (first, 1 - first, 1 - first, first):
            times[i].append(sample(i))
        pairs = len(times[0])
        if pairs + 2 > max_pairs or late():
            break
        if stop is not None and pairs >= next_look:
            if stop(paired_ratio(*times, confidence=confidence)):
                break
            next_look = math.ceil(pairs * _LOOK_GROWTH)
    return tuple(times[0]), tuple(times[1])


def compare(
    manager: HardwareManager,
    baseline: Callable[[], Any],
    candidate: Callable[[], Any],
    *,
    max_seconds: float,
    min_pairs: int = 8,
    max_pairs: int = 200,
    confidence: float = 0.95,
    stop: Callable[[Ratio], bool] | None = None,
) -> Measurement:
    """Time two functions side by side and return raw samples with their paired ratio.

    Both functions are warmed up until they get no faster; of a function shorter than 5 ms a
    sample is the mean of several calls. Garbage collection is off within a sample.

    Args:
        manager: Times and locks the device.
        baseline: One call (step) of the unmodified model.
        candidate: One call of the candidate; compiled already, if its compile time is not to count as warm-up.
        max_seconds: Limit of sampling and warm-up together. It goes before `min_pairs`: one ABBA block always runs.
        min_pairs: Pairs before `stop` is asked.
        max_pairs: Pairs at most (and at least two).
        confidence: Of the interval that `stop` and the caller see.
        stop: Asked for the ratio so far after `min_pairs` and then each time their number has grown by 40 %;
            sampling ends when it returns True. Without it, sampling ends at `max_pairs` or `max_seconds`.

    Returns:
        The measurement; `compile_seconds` is left 0.0. Telemetry holds `foreign_load_cores`, `warm_up_calls`,
        `calls_per_sample`, `baseline_calls_per_sample` and what the manager tells at the end.
    """
    series = (_Series(manager, baseline), _Series(manager, candidate))
    with manager.exclusive():
        began = time.monotonic()
        warm_up = _warm_up(series, began + _WARM_UP_SHARE * max_seconds)
        gc.collect()
        manager.telemetry()  # some values count from the call before
        load = ForeignLoad.now()
        times = collect(
            lambda i: series[i].sample(),
            min_pairs=min_pairs,
            max_pairs=max_pairs,
            confidence=confidence,
            stop=stop,
            late=lambda: time.monotonic() - began > max_seconds,
        )
        foreign = ForeignLoad.now().cores_since(load)
        peaks = manager.peak_bytes(baseline), manager.peak_bytes(candidate)
        telemetry: Mapping[str, float] = {
            **manager.telemetry(),
            "foreign_load_cores": foreign,
            "warm_up_calls": float(warm_up),
            "calls_per_sample": float(series[1].calls),
            "baseline_calls_per_sample": float(series[0].calls),
        }
    return Measurement(
        samples_ms=times[1],
        baseline_samples_ms=times[0],
        ratio=paired_ratio(*times, confidence=confidence),
        peak_bytes=peaks[1],
        baseline_peak_bytes=peaks[0],
        telemetry=telemetry,
    )
