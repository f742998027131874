"""Says whether one side became slower than another, with error rates that are known.

`judge_pairs` is for a fixed number of pairs that were taken side by side, `Sequential` for pairs that are looked at
while they come in, `judge_series` for series that were taken one after the other. One engine is under all of them:
`measure.stats.paired_ratio` with `dependence_bound`. `docs/guard-statistics.md` explains the method, and
`benchmarks/guard_power.py` measures its false alarms and its power.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from kernel_pytorch.core.types import Ratio, Verdict
from kernel_pytorch.measure.stats import dependence_bound, paired_ratio
from kernel_pytorch.validation.drift import MIN_SAMPLES, change_with_drift
from kernel_pytorch.validation.spread import notes_of, warm_up

__all__ = ["ERROR", "MIN_PAIRS", "Judgement", "Sequential", "judge_pairs", "judge_series"]

ERROR = 0.0025
"""Aimed-at probability of a FAIL of an unchanged side, and of a PASS of a slowdown of `max_slowdown`.

A quarter of what is promised (1 %): the rest is for series whose dependence is worse than it looks.
"""
MIN_PAIRS = 10
"""Pairs below which there is no verdict: ten are the fewest whose signs alone can be this unlikely, with a reserve."""
_LOOK_GROWTH = 1.4
_EARLY = 0.3
"""Share of the error that the looks before the last one spend together."""
_HOW = (
    "Take both sides in turns on one device: `kpt compare` with two revisions, environments, targets or a command "
    "does; for series of your own, alternate the runs and pass --paired"
)

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the samples say.

    Attributes:
        verdict: `PASS`, `FAIL` or `INCONCLUSIVE`.
        change: Time of head over time of base, with its interval: 1.03 is 3 % slower.
        max_slowdown: The smallest slowdown that matters, as a fraction.
        pairs: Pairs that were judged, warm-up left out (of series apart: samples of the shorter one).
        reason: One sentence.
        notes: What else is worth telling, one sentence each.
    """

    verdict: Verdict
    change: Ratio
    max_slowdown: float
    pairs: int
    reason: str
    notes: tuple[str, ...] = ()

    @property
    def speedup(self) -> Ratio:
        """The change the other way round: time of base over time of head, above 1 is faster."""
        return _inverse(self.change)


def judge_pairs(base_ms: Sequence[float], head_ms: Sequence[float], *, max_slowdown: float = 0.03) -> Judgement:
    """Judge pairs of times taken side by side, of a number that was fixed before they were seen.

    `PASS` where the upper end of the interval of the slowdown is below `max_slowdown`. `FAIL` where its lower end is
    above 0 and the estimate at least half of `max_slowdown`. Else `INCONCLUSIVE`.

    Args:
        base_ms: Times of the old side in milliseconds, in time order.
        head_ms: Times of the new side; sample i was taken beside sample i of `base_ms`.
        max_slowdown: The smallest slowdown that matters, as a fraction.

    Raises:
        ValueError: Different lengths, no pair, a time that is not a positive number, or a `max_slowdown` not above 0.
    """
    _check_slowdown(max_slowdown)
    return _judge(base_ms, head_ms, max_slowdown, ERROR)


class Sequential:
    """Judges pairs while they come in, and stops as soon as the verdict is certain.

    The looks before the last come at numbers of pairs that grow by 40 %. Together they spend 30 % of `ERROR`, in equal
    parts; the rest is kept for the last look, whenever that is. The parts add up to no more than the whole
    however the looks depend on each other, so asking often raises no more false alarms.
    """

    def __init__(self, max_slowdown: float, max_pairs: int, min_pairs: int = 16) -> None:
        """Plan the looks.

        Args:
            max_slowdown: The smallest slowdown that matters, as a fraction.
            max_pairs: Pairs at which the last look is taken, if not told earlier.
            min_pairs: Pairs before the first look.

        Raises:
            ValueError: A `max_slowdown` not above 0, or `max_pairs` below 1.
        """
        _check_slowdown(max_slowdown)
        if max_pairs < 1:
            raise ValueError(f"max_pairs must be at least 1, got {max_pairs}")
        self.max_slowdown = max_slowdown
        self.max_pairs = max_pairs
        self.looks = _schedule(max(MIN_PAIRS, min_pairs), max_pairs)
        self._taken = 0

    def look(self, base_ms: Sequence[float], head_ms: Sequence[float], *, last: bool = False) -> Judgement | None:
        """Look at all pairs so far; cheap where no look is due.

        Args:
            base_ms: As in `judge_pairs`: everything since the beginning.
            head_ms: As in `judge_pairs`.
            last: No more pairs will come: time is up. This must not depend on what the pairs say.

        Returns:
            The judgement where it is certain or this look is the last one; `None`: go on.

        Raises:
            ValueError: As `judge_pairs`.
        """
        pairs = len(base_ms)
        if last or pairs >= self.max_pairs:
            return self.last(base_ms, head_ms)
        due = sum(n <= pairs for n in self.looks)
        if due <= self._taken:
            return None
        self._taken = due
        error = (1.0 - self.early_confidence) / 2.0
        judged = _judge(base_ms, head_ms, self.max_slowdown, error, undecided=False)
        return None if judged.verdict is Verdict.INCONCLUSIVE else judged

    def last(self, base_ms: Sequence[float], head_ms: Sequence[float]) -> Judgement:
        """Return the judgement of all pairs, whatever it is; arguments and errors are those of `look`."""
        error = ERROR * (1.0 - _EARLY) if self.looks else ERROR
        return _judge(base_ms, head_ms, self.max_slowdown, error)

    @property
    def early_confidence(self) -> float:
        """Confidence of the interval at each look before the last one."""
        return 1.0 - 2.0 * ERROR * _EARLY / max(1, len(self.looks))

    def stop(self, speedup: Ratio) -> bool:
        """Return whether a look decides, for samplers that only tell the speed-up (`sampler.compare`).

        Pass `early_confidence` with it, ask `last` for the judgement.
        """
        return _verdict(_inverse(speedup), self.max_slowdown) is not Verdict.INCONCLUSIVE


def judge_series(base_ms: Sequence[float], head_ms: Sequence[float], *, max_slowdown: float = 0.03) -> Judgement:
    """Judge series that were not taken side by side.

    The device may have changed between the two, which no statistics of the samples can tell from a change of the
    code. The verdict is `INCONCLUSIVE` unless the difference stays clear of the drift that each series shows by itself
    (`validation.drift`), and the reason says how to take them properly.

    Args:
        base_ms: Times of the old side in milliseconds, in time order.
        head_ms: Times of the new side, in time order; another number of them is fine.
        max_slowdown: The smallest slowdown that matters, as a fraction.

    Raises:
        ValueError: No sample, a time that is not a positive number, or a `max_slowdown` not above 0.
    """
    _check_slowdown(max_slowdown)
    base, head = _times("base", base_ms), _times("head", head_ms)
    shorter = min(base.size, head.size)
    skipped = max(warm_up(base, base), warm_up(head, head))
    base, head = base[skipped:], head[skipped:]
    pairs = min(base.size, head.size)
    if pairs < MIN_SAMPLES:
        value = float(np.median(head) / np.median(base))
        reason = (
            f"the series were not taken side by side, and {shorter} samples are too few to bound the drift between "
            f"them ({MIN_SAMPLES} after a warm-up are needed). {_HOW}"
        )
        change = Ratio(value, 0.0, math.inf, 1.0 - 2.0 * ERROR)
        return Judgement(Verdict.INCONCLUSIVE, change, max_slowdown, pairs, reason)
    change, drift = change_with_drift(base, head, 1.0 - 2.0 * ERROR)
    verdict = _verdict(change, max_slowdown)
    seen = (
        f"up to {100 * drift:.1f} % may be drift" if math.isfinite(drift) else "one has a trend, so drift has no bound"
    )
    where = f"the series were not taken side by side, and {seen}"
    if verdict is Verdict.INCONCLUSIVE:
        reason = f"{where}: {_seen(change, max_slowdown)}. {_HOW}"
    else:
        reason = f"{_ground(verdict, change, max_slowdown)}; {where}"
    return Judgement(verdict, change, max_slowdown, pairs, reason, _skipped(skipped))


def _judge(
    base_ms: Sequence[float], head_ms: Sequence[float], max_slowdown: float, error: float, *, undecided: bool = True
) -> Judgement:
    """Judge all pairs so far; where nobody will see what is `undecided`, its notes are not worked out."""
    if len(base_ms) != len(head_ms):
        raise ValueError(f"need pairs of times, got {len(base_ms)} of the base and {len(head_ms)} of the head")
    base, head = _times("base", base_ms), _times("head", head_ms)
    taken = base.size
    skipped = warm_up(base, head) if taken >= MIN_PAIRS + 2 else 0
    skipped = min(skipped, taken - MIN_PAIRS) if skipped else 0
    base, head = base[skipped:], head[skipped:]
    pairs = base.size
    change = paired_ratio(
        head.tolist(),
        base.tolist(),
        confidence=1.0 - 2.0 * error,
        dependence=partial(dependence_bound, sides=(np.log(base), np.log(head))),
    )
    if pairs < MIN_PAIRS:
        reason = f"{pairs} pairs are too few for a verdict: at least {MIN_PAIRS} are needed"
        return Judgement(Verdict.INCONCLUSIVE, change, max_slowdown, pairs, reason)
    verdict = _verdict(change, max_slowdown)
    reason = _ground(verdict, change, max_slowdown)
    if verdict is Verdict.INCONCLUSIVE and not undecided:
        return Judgement(verdict, change, max_slowdown, pairs, reason)
    if verdict is Verdict.INCONCLUSIVE:
        reason += f" in {pairs} pairs{_more(change, max_slowdown, pairs)}"
    notes = notes_of(base, head, slower=verdict is Verdict.FAIL, max_slowdown=max_slowdown)
    return Judgement(verdict, change, max_slowdown, pairs, reason, _skipped(skipped) + notes)


def _inverse(ratio: Ratio) -> Ratio:
    return Ratio(1.0 / ratio.value, 1.0 / ratio.high, 1.0 / ratio.low if ratio.low else math.inf, ratio.confidence)


def _verdict(change: Ratio, max_slowdown: float) -> Verdict:
    if change.high < 1.0 + max_slowdown * (1.0 - 1e-6):  # times without noise end at the limit, or a rounding below
        return Verdict.PASS
    if change.low > 1.0 and change.value >= 1.0 + max_slowdown / 2.0:
        return Verdict.FAIL
    return Verdict.INCONCLUSIVE


def _ground(verdict: Verdict, change: Ratio, max_slowdown: float) -> str:
    seen = _seen(change, max_slowdown)
    matters = f"{100 * max_slowdown:.3g} %"
    if verdict is Verdict.FAIL:
        return f"the head is slower: {seen}"
    if verdict is Verdict.INCONCLUSIVE:
        return f"{seen}: neither a slowdown that matters ({matters}) nor its absence is proven"
    if change.high < 1.0:
        return f"the head is faster: {seen}"
    if change.low > 1.0:
        return f"{seen}: slower, by less than the {matters} that matter"
    return f"{seen}: no slowdown of {matters} or more"


def _seen(change: Ratio, max_slowdown: float) -> str:
    digits = 1 if max_slowdown >= 0.02 else 2
    value, low, high = (
        f"{100 * (x - 1.0):+.{digits}f} %" if x < 1e3 else "unbounded" for x in (change.value, change.low, change.high)
    )
    return f"time changed by {value} ({low} to {high})"


def _more(change: Ratio, max_slowdown: float, pairs: int) -> str:
    """Say how many pairs should decide, from the width of the interval; nothing where that is not in sight."""
    if not (change.low > 0.0 and math.isfinite(change.high)):
        return ""
    half = math.log(change.high / change.low) / 2.0
    needed = pairs * (half / (0.6 * math.log1p(max_slowdown))) ** 2
    return f"; about {math.ceil(needed / 10.0) * 10} pairs should decide" if pairs * 1.2 < needed < 1e5 else ""


def _skipped(pairs: int) -> tuple[str, ...]:
    if not pairs:
        return ()
    which = "the first sample of both sides is" if pairs == 1 else f"the first {pairs} samples of both sides are"
    return (f"{which} left out as a warm-up",)


def _schedule(first: int, most: int) -> tuple[int, ...]:
    looks, n = [], first
    while n < most:
        looks.append(n)
        n = math.ceil(n * _LOOK_GROWTH)
    return tuple(looks)


def _check_slowdown(max_slowdown: float) -> None:
    if not 0.0 < max_slowdown < math.inf:
        raise ValueError(f"max_slowdown must be above 0, got {max_slowdown}")


def _times(side: str, times_ms: Sequence[float]) -> Array:
    times = np.asarray(times_ms, dtype=float)
    if times.ndim != 1 or not times.size:
        raise ValueError(f"the {side} has no times")
    bad = times[~((times > 0.0) & np.isfinite(times))]
    if bad.size:
        raise ValueError(f"the {side} has a time that is not a positive number of milliseconds: {bad[0]}")
    return times
