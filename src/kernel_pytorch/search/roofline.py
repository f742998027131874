"""The roofline: the least time that a device's peak rates leave to a workload (Williams et al., 2009)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kernel_pytorch.core.types import DeviceSpec

__all__ = ["FASTEST", "Roofline"]

FASTEST = "fastest"
"""A precision that is not known in advance: the device's fastest arithmetic."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """Operations by dtype and least bytes of a workload, on a device.

    Attributes:
        device: Gives the peak rates.
        flops: Floating-point operations by the dtype the model computes in.
        least_bytes: Least bytes moved.
        resident_bytes: What may stay in the device's cache from one call to the next.
    """

    device: DeviceSpec
    flops: Mapping[str, float]
    least_bytes: float
    resident_bytes: int

    def compute_s(self, precision: str = "") -> float:
        """Return the least time of the arithmetic, each dtype at its own rate or that of `precision` if faster."""
        fastest = max(self.device.peak_flops.values(), default=math.inf)
        seconds = 0.0
        for dtype, count in self.flops.items():
            rate = self.device.peak_flops.get(_arithmetic(dtype), fastest)
            if precision:
                rate = max(rate, self.device.peak_flops.get(precision, fastest))
            seconds += count / rate
        return seconds

    def memory_s(self, width: float = 1.0) -> float:
        """Return the least time of the memory traffic, with every byte of the model as `width` bytes."""
        if not self.device.bandwidth_bytes_per_s:
            return 0.0
        return max(0.0, self.least_bytes * width - self.resident_bytes) / self.device.bandwidth_bytes_per_s

    def floor_s(self, precision: str = "", width: float = 1.0) -> float:
        """Return the larger of both: no implementation at this precision can be faster."""
        return max(self.compute_s(precision), self.memory_s(width))


def _arithmetic(dtype: str) -> str:
    """Return the arithmetic that products of a dtype use: TF32 where the user has allowed it."""
    if dtype == "float32" and torch.cuda.is_available() and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return dtype
