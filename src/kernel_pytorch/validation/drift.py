"""How far the level of a device may have moved between two series that were not taken side by side."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kernel_pytorch.core.types import Ratio
from kernel_pytorch.measure.stats import dependence_bound, paired_ratio

__all__ = ["MIN_SAMPLES", "change_with_drift"]

Array = npt.NDArray[np.float64]

MIN_SAMPLES = 40
"""Samples of a series below which its own movement cannot be told from its noise."""
_PARTS = 5
_FAR = 2.0
_UNSEEN = 0.01
"""Movement between two runs that neither shows: what differs between two processes (memory layout, clock state)."""


def change_with_drift(base_ms: Array, head_ms: Array, confidence: float) -> tuple[Ratio, float]:
    """Return the change of the level, its interval widened by the drift that may lie between the series.

    The drift is taken to be no more than twice the larger of both series' own movement (the range of the levels of
    their fifths, noise included) and 1 %. That holds where the second series follows the first after a break no longer
    than half a series.

    Args:
        base_ms: Times of the old side, in time order; at least `MIN_SAMPLES`.
        head_ms: Times of the new side.
        confidence: Of the interval, drift apart.

    Returns:
        Head over base, and the drift as a fraction.
    """
    levels, halves = zip(*(_level(one, confidence) for one in (base_ms, head_ms)), strict=True)
    drift = _FAR * max(_movement(np.log(one)) for one in (base_ms, head_ms)) + _UNSEEN
    half = math.hypot(*halves) + drift
    centre = levels[1] - levels[0]
    return Ratio(math.exp(centre), math.exp(centre - half), math.exp(centre + half), confidence), drift


def _level(times: Array, confidence: float) -> tuple[float, float]:
    """Return the log of the level of a series and half the width of its interval."""
    one = paired_ratio(times.tolist(), [1.0] * times.size, confidence=confidence, dependence=dependence_bound)
    return math.log(one.value), max(math.log(one.high / one.value), math.log(one.value / one.low))


def _movement(logs: Array) -> float:
    return float(np.ptp([np.median(part) for part in np.array_split(logs, _PARTS)]))
