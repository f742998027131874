"""Statistics of interleaved times: an interval that covers, and decisions that survive being asked again and again.

A search asks "is it faster?" for every candidate and again after every few samples. So it decides in two steps, each
with its own samples:

1. *Screening*: `compare(..., confidence=SCREEN_CONFIDENCE, stop=screen_stop(min_gain))`. Contenders are those whose
   samples pass `is_win(paired_ratio(baseline, candidate), min_gain)`, fastest first, the simpler first where `tied`.
2. *Confirmation*, contender by contender until one passes: `n = confirm_pairs(ratio, pairs)`, then
   `compare(..., min_pairs=n, max_pairs=n)` without `stop`. It is chosen if `confirmed(...)`, and the plan reports the
   95 % interval of these fresh samples. Where none passes, the unmodified model is kept.

`benchmarks/interval_coverage.py` simulates this procedure.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from kernel_pytorch.core.types import Ratio

__all__ = [
    "CONFIRM_CONFIDENCE",
    "SCREEN_CONFIDENCE",
    "cannot_win",
    "cautious",
    "centred_ranks",
    "confirm_pairs",
    "confirmed",
    "dependence_bound",
    "is_win",
    "paired_ratio",
    "screen_stop",
    "tied",
]

SCREEN_CONFIDENCE = 0.999
"""Confidence of the intervals that screening looks at, several times for each of a dozen candidates."""
CONFIRM_CONFIDENCE = 0.999
"""Confidence at which fresh samples must exclude a ratio of one before a model is changed."""

_SHORTEST_MS = 1e-6
"""Times are not resolved below a nanosecond; a time of zero counts as this."""
_LARGEST_LOG = math.log(sys.float_info.max)

Array = npt.NDArray[np.float64]


@lru_cache(maxsize=256)
def _rank_cutoff(n: int, alpha: float) -> int:
    """Return the largest k with P(signed-rank statistic < k) <= alpha / 2; 0 where even the extreme is likelier."""
    if n <= 60:
        counts = np.ones(1)
        for i in range(1, n + 1):
            grown = np.zeros(counts.size + i)
            grown[: counts.size] += counts
            grown[i:] += counts
            counts = grown / 2.0
        return int(np.searchsorted(np.cumsum(counts), alpha / 2.0, side="right"))
    from scipy.stats import norm

    mean, sd = n * (n + 1) / 4.0, math.sqrt(n * (n + 1) * (2 * n + 1) / 24.0)
    return max(0, math.floor(mean + float(norm.ppf(alpha / 2.0)) * sd))


def _dependence(deviations: Array) -> float:
    """Return by how much dependence between pairs widens the interval; at least 1.

    The long-run standard deviation over the plain one, of ranks (so that spikes do not hide the dependence), from an
    autoregression of order one. Its small-sample bias is taken off, and a margin for its own error put on: without
    that, ten pairs with a correlation of 0.3 were covered in 92.8 % of 1,000 repeats, with it in 93.9 %. The
    sampler's random order leaves no such correlation unless one function alone drifts.
    """
    n = deviations.size
    if n < 8:
        return 1.0
    ranks = np.argsort(np.argsort(deviations)).astype(float)
    ranks -= ranks.mean()
    raw = float((ranks[:-1] * ranks[1:]).sum() / (ranks * ranks).sum())
    r = min(0.85, (raw * n + 1.0) / (n - 3.0) + 0.4 / math.sqrt(n))
    return math.sqrt((1.0 + r) / (1.0 - r)) if r > 0.0 else 1.0


def dependence_bound(deviations: Array, sides: tuple[Array, ...] = ()) -> float:
    """Return by how much dependence between pairs may widen the interval; at least 1.

    For verdicts that must hold for series whose pairs were formed by others: pairs that were no neighbours in truth
    keep the dependence of each series. It is bounded from the differences of the pairs, and once more from the sides
    themselves: without a common drift the differences depend on each other no more than the more dependent side, and
    a common drift makes them depend less. The smaller bound holds in both cases, and the second is the sharper one for
    short series, as it sees two of them.

    Two resampled launch-bound series of an H100 that were called pairs were told apart at a one-sided error of 0.25 %
    in 0.9 to 2.7 % of cases with `paired_ratio`'s own widening, and in 0.2 to 0.95 % with this (10 to 320 pairs).

    Args:
        deviations: Of the log ratios of the pairs from their centre.
        sides: Logs of the times of both sides.
    """
    if deviations.size < 8:
        return 1.0
    bound = _persistence((deviations,), margin=1.0)
    return min(bound, _persistence(sides, margin=0.35 + 3.0 / deviations.size)) if sides else bound


def centred_ranks(values: Array) -> Array:
    """Return ranks about their mean, equal values with equal ranks: rounded times must not look like a trend."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Array = (np.cumsum(counts) - (counts + 1) / 2.0)[inverse]
    ranks -= ranks.mean()
    return ranks


def _persistence(series: tuple[Array, ...], margin: float) -> float:
    """Return the long-run standard deviation over the plain one, of ranks, bounded from above.

    An autoregression of order one at its upper bound, and not less than what the means over longer and longer
    stretches show.

    Args:
        series: Of one length, at least eight; the autoregression is the most persistent one's.
        margin: Standard errors that are put on; fewer than six values are taken to tell nothing.
    """
    n = series[0].size
    largest, stretches = 0.0, []
    for values in series:
        ranks = centred_ranks(values)
        plain = float((ranks * ranks).mean())
        if not plain:
            continue
        raw = float((ranks[:-1] * ranks[1:]).mean()) * (n - 1) / n / plain
        largest = max(largest, (raw * n + 1.0) / (n - 3.0) + margin * (1.0 + 4.0 / n) / math.sqrt(n - 6.0))
        sums = np.concatenate([[0.0], np.cumsum(ranks)])
        length, stretch = 2, 1.0
        while n // length >= 4:
            means = (sums[length:] - sums[:-length]) / length
            stretch = max(stretch, length * float((means * means).mean()) / plain / (1.0 - length / n))
            length = math.ceil(length * 1.5)
        stretches.append(stretch)
    r = min(0.95, largest)
    stretched = math.sqrt(sum(stretches) / len(stretches)) if stretches else 1.0
    return max(math.sqrt((1.0 + r) / (1.0 - r)), stretched)


@lru_cache(maxsize=16)
def _pairs(n: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    return np.triu_indices(n)


def _walsh(logs: Array, cutoff: int) -> tuple[float, float, float]:
    """Return the median of the means of all pairs of values, the `cutoff`-th smallest and the `cutoff`-th largest.

    Each value is paired with itself too. Without a cutoff (0), the outer two are the extremes. Beyond 500 values,
    whose means would be many, the ranks are found by bisection.
    """
    n = logs.size
    total = n * (n + 1) // 2
    if n <= 500:
        rows, columns = _pairs(n)
        last = max(1, cutoff)
        wanted = (last - 1, (total - 1) // 2, total // 2, total - last)
        walsh = np.partition((logs[rows] + logs[columns]) / 2.0, sorted(set(wanted)))
        low, lower, upper, high = (float(walsh[k]) for k in wanted)
        return (lower + upper) / 2.0, low, high
    values = np.sort(logs)
    own = np.arange(n)

    def ranked(rank: int) -> float:
        low, high = float(values[0]), float(values[-1])
        for _ in range(60):
            middle = (low + high) / 2.0
            below = np.searchsorted(values, 2.0 * middle - values, side="right")
            if int(np.maximum(below - own, 0).sum()) >= rank:
                high = middle
            else:
                low = middle
        return high

    median = (ranked((total + 1) // 2) + ranked(total // 2 + 1)) / 2.0
    return median, ranked(max(1, cutoff)), ranked(total + 1 - max(1, cutoff))


def paired_ratio(
    baseline_ms: Sequence[float],
    candidate_ms: Sequence[float],
    *,
    confidence: float = 0.95,
    dependence: Callable[[Array], float] | None = None,
) -> Ratio:
    """Return the speed-up of paired times with an interval.

    The estimate is the Hodges-Lehmann centre of the log ratios of the pairs, the interval inverts Wilcoxon's
    signed-rank test (exact up to 60 pairs), widened where neighbouring pairs resemble each other. With too few
    pairs for the confidence asked, it is never narrower than Student's interval.

    Args:
        baseline_ms: Times of the unmodified model; sample i was taken beside sample i of the other.
        candidate_ms: Times of the candidate.
        confidence: Probability with which the interval covers the true ratio.
        dependence: By what factor to widen the interval, told by the deviations of the log ratios from their centre;
            by default the likely one.

    Returns:
        Baseline over candidate. One pair bounds nothing: its interval is (0, inf).

    Raises:
        ValueError: Different lengths, or no pair at all.
    """
    if len(baseline_ms) != len(candidate_ms) or not baseline_ms:
        raise ValueError(f"need pairs of times, got {len(baseline_ms)} and {len(candidate_ms)}")
    base = np.maximum(np.asarray(baseline_ms, dtype=float), _SHORTEST_MS)
    cand = np.maximum(np.asarray(candidate_ms, dtype=float), _SHORTEST_MS)
    logs = np.log(base) - np.log(cand)
    n = logs.size
    if n == 1:
        return Ratio(math.exp(float(logs[0])), 0.0, math.inf, confidence)
    cutoff = _rank_cutoff(n, 1.0 - confidence)
    centre, low, high = _walsh(logs, cutoff)
    if cutoff < 1:
        from scipy.stats import t

        half = float(t.ppf((1.0 + confidence) / 2.0, n - 1)) * float(logs.std(ddof=1)) / math.sqrt(n)
        low, high = min(float(logs.min()), centre - half), max(float(logs.max()), centre + half)
    wider = (dependence or _dependence)(logs - centre)
    low, high = centre + (low - centre) * wider, centre + (high - centre) * wider
    top = math.exp(high) if high < _LARGEST_LOG else math.inf  # two pairs at a high confidence bound next to nothing
    return Ratio(math.exp(centre), math.exp(low), top, confidence)


def is_win(ratio: Ratio, min_gain: float) -> bool:
    """Return whether the gain is both large enough and significant: at least `min_gain`, with 1.0 excluded."""
    return ratio.value >= 1.0 + min_gain and ratio.low > 1.0


def cannot_win(ratio: Ratio, min_gain: float) -> bool:
    """Return whether the interval excludes a gain of `min_gain`: more samples are not worth their time."""
    return ratio.high < 1.0 + min_gain


def cautious(ratio: Ratio) -> float:
    """Return the geometric mean of a ratio and its lower bound: what ranks candidates, so that noise wins no search."""
    return math.sqrt(ratio.value * max(ratio.low, 0.0))


def tied(a: Ratio, b: Ratio) -> bool:
    """Return whether two candidates, each compared with the baseline, cannot be told apart: the simpler is taken."""
    return a.low <= b.high and b.low <= a.high


def screen_stop(min_gain: float, *, precision: float = 0.03) -> Callable[[Ratio], bool]:
    """Return the `stop` of `sampler.compare` for screening; pass `confidence=SCREEN_CONFIDENCE` with it.

    It stops at a candidate that cannot win, and at a win whose interval is narrower than `precision` (relative).
    """

    def stop(ratio: Ratio) -> bool:
        return cannot_win(ratio, min_gain) or (is_win(ratio, min_gain) and ratio.high <= ratio.low * (1.0 + precision))

    return stop


def confirm_pairs(screened: Ratio, pairs: int, *, most: int = 400) -> int:
    """Return how many fresh pairs will confirm what screening saw, if it is true.

    Enough for an interval at `CONFIRM_CONFIDENCE` half as wide on each side as the gain (half-way between the
    estimate and its lower bound: what looks best was lucky), and at least 20 for gains of 15 % and more to 80 for 4 %
    and less: of 20 pairs, one spike of 50 % too many loses a ratio of 1.05. The number must be fixed before the fresh
    samples are seen: stopping at the first look that pleases would void their interval.

    Args:
        screened: The ratio of the screening.
        pairs: From how many pairs.
        most: Largest answer.
    """
    if not (screened.value > 1.0 and screened.low > 0.0 and math.isfinite(screened.high)):
        return most
    gain = max(math.log(screened.value) / 2.0, (math.log(screened.value) + math.log(screened.low)) / 2.0)
    half = (math.log(screened.high) - math.log(screened.low)) / 2.0
    half *= _normal_quantile(CONFIRM_CONFIDENCE) / _normal_quantile(screened.confidence)
    needed = max(pairs * (2.0 * half / gain) ** 2, min(80.0, max(20.0, 3.0 / gain)))
    return int(min(most, 2 * math.ceil(needed / 2.0)))


def _normal_quantile(confidence: float) -> float:
    return statistics.NormalDist().inv_cdf((1.0 + confidence) / 2.0)


def confirmed(baseline_ms: Sequence[float], candidate_ms: Sequence[float], min_gain: float) -> bool:
    """Return whether fresh samples of a number fixed beforehand confirm a win, at `CONFIRM_CONFIDENCE`."""
    return is_win(paired_ratio(baseline_ms, candidate_ms, confidence=CONFIRM_CONFIDENCE), min_gain)
