"""How far the level of a device may have moved between two series that were not taken side by side."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

from kernel_pytorch.core.types import Ratio
from kernel_pytorch.measure.stats import dependence_bound, paired_ratio

__all__ = ["MIN_SAMPLES", "change_with_drift"]

Array = npt.NDArray[np.float64]

MIN_SAMPLES = 40
"""Samples of a series below which its own movement cannot be told from its noise."""
_PARTS = 5
_FAR = 2.0
_TREND = 0.5
"""Rank correlation with time above which a series goes somewhere: where it would have gone later, nobody knows."""
_UNSEEN = 0.01
"""Movement between two runs that neither shows: what differs between two processes (memory layout, clock state)."""


def change_with_drift(base_ms: Array, head_ms: Array, confidence: float) -> tuple[Ratio, float]:
    """Return the change of the level, its interval widened by the drift that may lie between the series.

    The drift is taken to be no more than twice the larger of both series' own movement (the range of the levels of
    their fifths, noise included) and 1 %. That holds where the second series follows the first after a break no longer
    than half a series. A series with a trend has no bound at all.

    Args:
        base_ms: Times of the old side, in time order; at least `MIN_SAMPLES`.
        head_ms: Times of the new side.
        confidence: Of the interval, drift apart.

    Returns:
        Head over base, and the drift as a fraction; infinite with a trend, and so is the interval then.
    """
    logs = [np.log(one) for one in (base_ms, head_ms)]
    levels, halves = zip(*(_level(one, confidence) for one in (base_ms, head_ms)), strict=True)
    centre = levels[1] - levels[0]
    if max(map(_trend, logs)) > _TREND:
        return Ratio(math.exp(centre), 0.0, math.inf, confidence), math.inf
    drift = _FAR * max(map(_movement, logs)) + _UNSEEN
    half = math.hypot(*halves) + drift
    return Ratio(math.exp(centre), math.exp(centre - half), math.exp(centre + half), confidence), drift


def _level(times: Array, confidence: float) -> tuple[float, float]:
    """Return the log of the level of a series and half the width of its interval."""
    one = paired_ratio(times.tolist(), [1.0] * times.size, confidence=confidence, dependence=dependence_bound)
    return math.log(one.value), max(math.log(one.high / one.value), math.log(one.value / one.low))


def _trend(logs: Array) -> float:
    return 0.0 if np.ptp(logs) == 0.0 else abs(float(spearmanr(np.arange(logs.size), logs).statistic))


def _movement(logs: Array) -> float:
    return float(np.ptp([np.median(part) for part in np.array_split(logs, _PARTS)]))
