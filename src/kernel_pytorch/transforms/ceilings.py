"""Amdahl's law over the operator shares of a prediction: upper bounds of a speed-up, generous where in doubt."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

from kernel_pytorch.core.types import DeviceSpec, OperatorShare, Prediction

__all__ = ["COMPUTE", "FUSIBLE", "bounded", "rate", "roofline"]

COMPUTE = frozenset({"matmul", "convolution", "attention"})
FUSIBLE = frozenset({"elementwise", "normalization", "reduction", "copy", "embedding", "other", "overhead"})
"""What fusion can fold into its neighbours, so that in the limit it costs nothing."""


def bounded(prediction: Prediction, remaining: Mapping[str, float]) -> float:
    """Return the speed-up when each operator class keeps a fraction of its time.

    Args:
        prediction: The shares of the unmodified model.
        remaining: Least fraction of its time that a class keeps, by kind; a kind not named keeps all of it.

    Returns:
        Baseline time over what is left; `inf` where nothing is left or no shares are known.
    """
    if not prediction.shares:
        return inf
    left = sum(s.time_share * remaining.get(s.kind, 1.0) for s in prediction.shares)
    whole = sum(s.time_share for s in prediction.shares)
    return whole / left if left > 0 else inf


def rate(device: DeviceSpec, dtype: str) -> float:
    """Return the peak rate of a dtype in FLOP/s; 0.0 where it is unknown."""
    return float(device.peak_flops.get(dtype, 0.0))


def roofline(share: OperatorShare, prediction: Prediction, device: DeviceSpec, dtype: str) -> float:
    """Return the fraction of its time that a class would need at the device's peak rate; 1.0 where unknown.

    Main-memory traffic is left out on purpose: what stays in a cache is not bound by it, and this is a lower bound.
    A class that is faster already than `dtype` can be computes in a narrower one: a bfloat16 model, say.
    """
    peak = rate(device, dtype)
    spent_s = share.time_share * prediction.baseline_ms / 1e3
    if not peak or not share.flops or spent_s <= 0:
        return 1.0
    if share.flops / spent_s > peak:
        peak = max(peak, rate(device, "bfloat16"), rate(device, "float16"))
    return min(1.0, share.flops / peak / spent_s)
