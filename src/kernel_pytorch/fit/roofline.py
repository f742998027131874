"""How long a step takes at best, from what it computes and moves and what the device can: a prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ASSUMPTIONS", "StepPrediction", "predict_step"]

ASSUMPTIONS = (
    "peak rates as published; matrix products in bfloat16; computing, memory traffic and collectives overlap fully in "
    "step_s and not at all in serial_s; no launch, input or host time"
)


@dataclass(frozen=True, slots=True)
class StepPrediction:
    """A roofline's step time; a prediction, not verified on hardware.

    Attributes:
        compute_s: Floating-point operations of one device over its peak rate.
        memory_s: Bytes accessed by one device over its bandwidth.
        network_s: Bytes of collectives over the bandwidth of the links.
        mfu: Share of the peak rate that `step_s` means, an upper bound.
    """

    compute_s: float
    memory_s: float
    network_s: float
    mfu: float
    label: str = "prediction, unverified on hardware"
    assumptions: str = ASSUMPTIONS

    @property
    def step_s(self) -> float:
        """Time where everything overlaps: the longest of the three, a lower bound."""
        return max(self.compute_s, self.memory_s, self.network_s)

    @property
    def serial_s(self) -> float:
        """Time where nothing overlaps: their sum."""
        return self.compute_s + self.memory_s + self.network_s

    @property
    def bound(self) -> str:
        """What limits it: `compute`, `memory` or `network`."""
        times = {"compute": self.compute_s, "memory": self.memory_s, "network": self.network_s}
        return max(times, key=lambda name: times[name])


def predict_step(
    *,
    flops: float,
    bytes_accessed: float,
    peak_flops: float,
    bandwidth_bytes_per_s: float,
    collectives: Mapping[str, int] | None = None,
    network_bytes_per_s: float | None = None,
) -> StepPrediction | None:
    """Return the roofline of one device's share of a step; `None` where nothing is computed or moved.

    Args:
        flops: Of one device.
        bytes_accessed: Of one device.
        peak_flops: Operations a second.
        bandwidth_bytes_per_s: Of its memory.
        collectives: Bytes of one device's results by kind.
        network_bytes_per_s: Of its links together; collectives count nothing where it is not known.
    """
    compute, memory = flops / peak_flops, bytes_accessed / bandwidth_bytes_per_s
    moved = sum((collectives or {}).values())
    network = moved / network_bytes_per_s if network_bytes_per_s else 0.0
    longest = max(compute, memory, network)
    if longest <= 0.0:
        return None
    return StepPrediction(compute, memory, network, mfu=compute / longest)
