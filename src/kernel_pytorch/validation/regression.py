"""Says whether one side became slower than another, with error rates that are known.

`judge_pairs` is for a fixed number of pairs that were taken side by side, `Sequential` for pairs that are looked at
while they come in, `judge_series` for series that were taken one after the other. The engine under the first two is
`measure.stats.paired_ratio`; `benchmarks/guard_power.py` measures false alarms and power of all three.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kernel_pytorch.core.types import Ratio, Verdict
from kernel_pytorch.measure.stats import paired_ratio

__all__ = ["Judgement", "Sequential", "judge_pairs", "judge_series"]

ERROR = 0.005
"""Probability of a wrong FAIL of an unchanged side, and of a wrong PASS of a slowdown of `max_slowdown`."""
MIN_PAIRS = 10
_LOOK_GROWTH = 1.4
HOW = (
    "take both side by side in turns on one device (kpt compare with two revisions, environments or targets, or "
    "--paired for series whose sample i was taken beside sample i of the other)"
)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the samples say.

    Attributes:
        verdict: `PASS`, `FAIL` or `INCONCLUSIVE`.
        change: Time of head over time of base, with its interval: 1.03 is 3 % slower.
        max_slowdown: The smallest slowdown that matters.
        pairs: Pairs (or samples of the shorter series) that were judged.
        reason: One sentence.
        notes: What else is worth telling.
    """

    verdict: Verdict
    change: Ratio
    max_slowdown: float
    pairs: int
    reason: str
    notes: tuple[str, ...] = ()


def judge_pairs(base_ms: Sequence[float], head_ms: Sequence[float], *, max_slowdown: float = 0.03) -> Judgement:
    """Judge pairs of times taken side by side, of a number that was fixed beforehand.

    Args:
        base_ms: Times of the old side, in time order.
        head_ms: Times of the new side; sample i was taken beside sample i of `base_ms`.
        max_slowdown: The smallest slowdown that matters, as a fraction.

    Raises:
        ValueError: Different lengths, no pair, a time that is not a positive number, or a `max_slowdown` not above 0.
    """
    _check(base_ms, head_ms, max_slowdown)
    return _judge(base_ms, head_ms, max_slowdown, 1.0 - 2.0 * ERROR)


class Sequential:
    """Judges pairs while they come in, and stops as soon as the verdict is certain.

    Half of the permitted error is spent in equal parts on the looks before the last, whose number of pairs grows by
    40 %; the other half is kept for the last, whenever that is. So looking often raises no more false alarms.
    """

    def __init__(self, max_slowdown: float, max_pairs: int, min_pairs: int = 16) -> None:
        """Plan the looks.

        Args:
            max_slowdown: The smallest slowdown that matters, as a fraction.
            max_pairs: Pairs after which the last look is taken.
            min_pairs: Pairs before the first look.
        """
        _check((1.0,), (1.0,), max_slowdown)
        self.max_slowdown = max_slowdown
        self.max_pairs = max_pairs
        self.looks = _schedule(max(MIN_PAIRS, min_pairs), max_pairs)
        self._taken = 0

    def look(self, base_ms: Sequence[float], head_ms: Sequence[float], *, last: bool = False) -> Judgement | None:
        """Look at all pairs so far.

        Args:
            base_ms: As in `judge_pairs`: everything since the beginning.
            head_ms: As in `judge_pairs`.
            last: No more pairs will come (time is up).

        Returns:
            The judgement where it is certain or this look is the last; `None`: go on.
        """
        pairs = len(base_ms)
        if last or pairs >= self.max_pairs:
            _check(base_ms, head_ms, self.max_slowdown)
            share = 0.5 if self.looks else 1.0
            return _judge(base_ms, head_ms, self.max_slowdown, 1.0 - 2.0 * ERROR * share)
        due = sum(n <= pairs for n in self.looks)
        if due <= self._taken:
            return None
        self._taken = due
        _check(base_ms, head_ms, self.max_slowdown)
        share = 0.5 / len(self.looks)
        judged = _judge(base_ms, head_ms, self.max_slowdown, 1.0 - 2.0 * ERROR * share)
        return None if judged.verdict is Verdict.INCONCLUSIVE else judged


def judge_series(base_ms: Sequence[float], head_ms: Sequence[float], *, max_slowdown: float = 0.03) -> Judgement:
    """Judge series that were not taken side by side.

    The device may have changed between the two, which no statistics of the samples can tell from a change of the
    code. The verdict is `INCONCLUSIVE` unless the difference is clear of the drift that each series shows by itself.

    Args:
        base_ms: Times of the old side, in time order.
        head_ms: Times of the new side, in time order; another number of them is fine.
        max_slowdown: The smallest slowdown that matters, as a fraction.

    Raises:
        ValueError: No sample, a time that is not a positive number, or a `max_slowdown` not above 0.
    """
    for one in (base_ms, head_ms):
        _check(one, one, max_slowdown)
    pairs = min(len(base_ms), len(head_ms))
    levels = [_levels(np.log(np.asarray(one, dtype=float))) for one in (base_ms, head_ms)]
    centre = float(np.median(levels[1]) - np.median(levels[0]))
    if pairs < 40:
        change = Ratio(math.exp(centre), 0.0, math.inf, 1.0 - 2.0 * ERROR)
        reason = f"not taken side by side, and {pairs} samples are too few to bound a drift (40 needed): {HOW}"
        return Judgement(Verdict.INCONCLUSIVE, change, max_slowdown, pairs, reason)
    drift = 2.0 * max(float(np.ptp(one)) for one in levels) + 0.01
    change = Ratio(math.exp(centre), math.exp(centre - drift), math.exp(centre + drift), 1.0 - 2.0 * ERROR)
    verdict = _verdict(change, max_slowdown)
    reason = f"{_describe(verdict, change, max_slowdown)}; not taken side by side: drift may be {drift:.1%}"
    if verdict is Verdict.INCONCLUSIVE:
        reason += f": {HOW}"
    return Judgement(verdict, change, max_slowdown, pairs, reason)


def _levels(logs: np.ndarray) -> list[float]:
    return [float(np.median(part)) for part in np.array_split(logs, min(8, logs.size))]


def _schedule(first: int, most: int) -> tuple[int, ...]:
    looks, n = [], first
    while n < most:
        looks.append(n)
        n = math.ceil(n * _LOOK_GROWTH)
    return tuple(looks)


def _check(base_ms: Sequence[float], head_ms: Sequence[float], max_slowdown: float) -> None:
    if len(base_ms) != len(head_ms) or not len(base_ms):
        raise ValueError(f"need pairs of times, got {len(base_ms)} and {len(head_ms)}")
    if not 0.0 < max_slowdown < math.inf:
        raise ValueError(f"max_slowdown must be above 0, got {max_slowdown}")
    for name, times in (("base", base_ms), ("head", head_ms)):
        bad = [t for t in times if not 0.0 < t < math.inf]
        if bad:
            raise ValueError(f"{name} has a time that is not a positive number of milliseconds: {bad[0]}")


def _judge(base_ms: Sequence[float], head_ms: Sequence[float], max_slowdown: float, confidence: float) -> Judgement:
    change = paired_ratio(head_ms, base_ms, confidence=confidence)
    pairs = len(base_ms)
    if pairs < MIN_PAIRS:
        reason = f"{pairs} pairs are too few to judge; at least {MIN_PAIRS} are needed"
        return Judgement(Verdict.INCONCLUSIVE, change, max_slowdown, pairs, reason)
    verdict = _verdict(change, max_slowdown)
    return Judgement(verdict, change, max_slowdown, pairs, _describe(verdict, change, max_slowdown))


def _verdict(change: Ratio, max_slowdown: float) -> Verdict:
    if change.high < 1.0 + max_slowdown * (1.0 - 1e-6):
        return Verdict.PASS
    if change.low > 1.0 and change.value >= 1.0 + max_slowdown / 2.0:
        return Verdict.FAIL
    return Verdict.INCONCLUSIVE


def _describe(verdict: Verdict, change: Ratio, max_slowdown: float) -> str:
    seen = f"{change.value - 1.0:+.1%} ({change.low - 1.0:+.1%} to {change.high - 1.0:+.1%})"
    if verdict is Verdict.PASS:
        return f"time changed by {seen}: less than the {max_slowdown:.3g} that matters"
    if verdict is Verdict.FAIL:
        return f"slower by {seen}"
    return f"time changed by {seen}: not decided"
