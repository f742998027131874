"""What else two series of times show: a warm-up, noise of one side alone, rare slow steps, a trend.

None of it makes a verdict. Rules are symmetric in the two sides, so that an unchanged side is treated like the other.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, spearmanr

from kernel_pytorch.measure.stats import centred_ranks, dependence_bound, paired_ratio

__all__ = ["notes_of", "warm_up"]

Array = npt.NDArray[np.float64]

_SIGMA = 1.4826
"""Standard deviations of a Gaussian in one median absolute deviation."""
_NOISIER = 1.5
"""Ratio of spreads that is worth a note, where it is proven."""
_ALPHA = 1e-3
"""Error rate of each note."""


def warm_up(base: Array, head: Array) -> int:
    """Return how many leading pairs are a warm-up, to be left out on both sides.

    A pair belongs to it while either side's time is above its own median of the second half by more than four robust
    standard deviations and by more than 2 %. A quarter of the pairs at most.

    Args:
        base: Times in time order, in any unit.
        head: As many times.
    """
    most = base.size // 4
    slow = np.zeros(most, dtype=bool)
    for times in (base, head):
        logs = np.log(times)
        level = float(np.median(logs[logs.size // 2 :]))
        slow |= logs[:most] > level + max(0.02, 4.0 * _SIGMA * float(np.median(np.abs(logs - level))))
    return most if slow.all() else int(np.argmin(slow))


def notes_of(base: Array, head: Array, *, slower: bool, max_slowdown: float) -> tuple[str, ...]:
    """Return what is worth telling of pairs, one sentence each.

    Args:
        base: Times of the old side, warm-up left out.
        head: Times of the new side, paired with them.
        slower: Whether the head was judged slower; else a spread that grew is called "only noisier".
        max_slowdown: The smallest change of the mean and of the trend that is worth a note.
    """
    if base.size < 10:
        return ()
    logs = np.log(head) - np.log(base)
    noise = _noisier(base, head, slower=slower) or _slow_steps(base, head, slower=slower, max_slowdown=max_slowdown)
    return tuple(filter(None, (noise, _trend(logs, max_slowdown), _resemblance(logs))))


def spread(times: Array) -> float:
    """Return the robust relative standard deviation of one sample, from neighbours, so that drift does not count."""
    return _SIGMA * float(np.median(np.abs(np.diff(np.log(times))))) / math.sqrt(2.0)


def _noisier(base: Array, head: Array, *, slower: bool) -> str:
    jumps = [np.abs(np.diff(np.log(times))) for times in (base, head)]
    if not (jumps[0].any() or jumps[1].any()):
        return ""
    ratio = paired_ratio(jumps[1].tolist(), jumps[0].tolist(), confidence=1.0 - 2.0 * _ALPHA, dependence=_clear)
    seen = f"a sample's spread is {100 * spread(head):.1f} % against {100 * spread(base):.1f} %"
    if ratio.low > 1.0 and ratio.value >= _NOISIER:
        return f"the head is also noisier: {seen}" if slower else f"the head is only noisier, not slower: {seen}"
    if ratio.high < 1.0 and ratio.value <= 1.0 / _NOISIER:
        return f"the head is less noisy: {seen}"
    return ""


def _clear(deviations: Array) -> float:
    """Jumps share a sample with their neighbours: never trust their number in full."""
    return max(1.2, dependence_bound(deviations))


def _slow_steps(base: Array, head: Array, *, slower: bool, max_slowdown: float) -> str:
    """Tell of steps far above a side's own median, which move its mean and not its centre."""
    above = [np.log(times) - float(np.median(np.log(times))) for times in (base, head)]
    sigma = _SIGMA * float(np.median(np.abs(np.concatenate(above))))
    limit = max(max_slowdown, 5.0 * sigma)
    counts = [int((one > limit).sum()) for one in above]
    if counts[1] <= counts[0] or binomtest(counts[1], sum(counts), alternative="greater").pvalue > _ALPHA:
        return ""
    mean = float(head.mean() / base.mean()) - 1.0
    seen = (
        f"{counts[1]} of {head.size} samples of the head are over {100 * limit:.0f} % above its median, "
        f"{counts[0]} of the base; the mean changed by {100 * mean:+.1f} %"
    )
    kind = "also has more slow steps" if slower else "is only noisier, not slower in its typical step"
    return f"the head {kind}: {seen}"


def _trend(logs: Array, max_slowdown: float) -> str:
    if logs.size < 20 or np.ptp(logs) == 0.0:
        return ""
    third = logs.size // 3
    first, last = float(np.median(logs[:third])), float(np.median(logs[-third:]))
    # A correlation of ranks among pairs that resemble each other is no proof: it must hold for every fourth pair too.
    thin = logs[::4] if logs.size >= 80 else logs
    if abs(last - first) < max_slowdown or spearmanr(np.arange(thin.size), thin).pvalue > _ALPHA:
        return ""
    return (
        f"the difference moves while they run: {100 * np.expm1(first):+.1f} % in the first third of the pairs, "
        f"{100 * np.expm1(last):+.1f} % in the last"
    )


def _resemblance(logs: Array) -> str:
    if logs.size < 20:
        return ""
    ranks = centred_ranks(logs)
    r = float((ranks[:-1] * ranks[1:]).sum() / max(1.0, (ranks * ranks).sum()))
    if r * np.sqrt(logs.size) < 3.3:
        return ""
    return (
        f"neighbouring pairs resemble each other (correlation {r:.2f}), so the interval was widened: "
        "one side drifts alone, or the pairs were not taken side by side"
    )
