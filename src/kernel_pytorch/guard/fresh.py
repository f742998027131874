"""Whether a slower head is slow again in fresh processes: the process is the unit, not the sample.

Two processes of one program differ for their own luck (where their memory lies, which core they began on). Of 53 runs
in which both sides were the same, three were called slower, and one more pair of processes confirmed it; all three
were among the 18 that are bound by launches (`guard_live_one_pair.json`, CPU). No number of samples of a pair tells its
luck from a change. So several fresh pairs are run, one estimate each, and Student's t over those decides; the run that
raised the suspicion is left out, since it was chosen for being slow.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from kernel_pytorch.core.types import Ratio
from kernel_pytorch.measure.stats import paired_ratio

__all__ = ["FEWEST_PAIRS", "MOST_PAIRS", "Fresh", "judge_fresh"]

FEWEST_PAIRS = 12
"""Pairs of samples below which a pair of processes says nothing."""
MOST_PAIRS = 40
"""Pairs of samples beyond which a pair of processes is known well enough: its luck is the larger error."""
_ROUNDS = (3, 5, 8)
"""After how many fresh pairs of processes it is decided, or given up."""
_ERROR = 0.01 / len(_ROUNDS)
"""One-sided, each look: together 1 % of those whom the first run suspected wrongly."""


@dataclass(frozen=True, slots=True)
class Fresh:
    """What fresh pairs of processes say so far.

    Attributes:
        decided: Whether more of them would not change it, or are not worth their time.
        slower: Whether they prove a slowdown that matters.
        change: Head over base, the mean of the pairs of processes, with its one-sided bound below.
        told: In words.
        count: How many there are.
    """

    decided: bool
    slower: bool
    change: Ratio | None
    told: str
    count: int


def judge_fresh(runs: Sequence[tuple[Sequence[float], Sequence[float]]], max_slowdown: float) -> Fresh:
    """Decide from the samples `(base_ms, head_ms)` of each fresh pair of processes.

    Slower means: by Student's t over the pairs of processes a slowdown is proven, and their mean is at least half of
    `max_slowdown`. It is given up early where two pairs together show less than a third of it.

    Args:
        runs: One entry for each pair of processes.
        max_slowdown: The smallest slowdown that matters, as a fraction.
    """
    logs = [math.log(paired_ratio(head, base).value) for base, head in runs]
    count = len(logs)
    if count < 2:
        return Fresh(decided=False, slower=False, change=None, told="too few fresh processes", count=count)
    mean, limit = statistics.fmean(logs), math.log1p(max_slowdown)
    from scipy.stats import t

    half = float(t.ppf(1.0 - _ERROR, count - 1)) * statistics.stdev(logs) / math.sqrt(count)
    change = Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), 1.0 - 2.0 * _ERROR)
    told = f"{100.0 * (change.value - 1.0):+.1f} % in {count} fresh pairs of processes"
    if mean < limit / 3.0:
        return Fresh(decided=True, slower=False, change=change, told=told, count=count)
    slower = count in _ROUNDS and mean >= limit / 2.0 and mean - half > 0.0
    return Fresh(decided=slower or count >= _ROUNDS[-1], slower=slower, change=change, told=told, count=count)
