"""How fast a GPU multiplied and cast in FP8, measured: what forecasts are made of."""

from __future__ import annotations

from dataclasses import dataclass

from kernel_pytorch.errors import InputsError

__all__ = ["RATES", "Float8Rates", "rates_of"]


@dataclass(frozen=True, slots=True)
class Float8Rates:
    """Of one architecture, at its power limit.

    Attributes:
        arch: As `DeviceSpec.arch`.
        gpu: That was measured.
        source: The artefact that the numbers are from.
        plain_flops: Operations a second of products in bfloat16.
        fast_flops: Of products in FP8 with fast sums.
        exact_flops: Of products in FP8 without, one operand E5M2.
        cast_ms: What a cast takes at least, with its launches.
        cast_ns: Nanoseconds an element on top of that, both copies, by a delayed scale.
        amax_ns: Nanoseconds an element on top of that, where the scale is the tensor's own.
        layer_ms: What a layer in FP8 takes at least, forward and backward, uncompiled: launches of its kernels.
    """

    arch: str
    gpu: str
    source: str
    plain_flops: float
    fast_flops: float
    exact_flops: float
    cast_ms: float
    cast_ns: float
    amax_ns: float
    layer_ms: float


RATES: dict[str, Float8Rates] = {
    "sm_90": Float8Rates(
        arch="sm_90",
        gpu="H200",
        source="benchmarks/results/nvidia-sm_90-1/float8_layers_first.json",
        plain_flops=6.681e14,
        fast_flops=1.270e15,
        exact_flops=1.243e15,
        cast_ms=0.0563,
        cast_ns=1.033e-3,
        amax_ns=0.339e-3,
        layer_ms=1.675,
    ),
}
"""By architecture. Of medians of the artefact's rows: products by the mean of four shapes, casts by a line through
those of 16,384 rows, the least time of a layer by the one of least products. A test computes them again."""


def rates_of(arch: str) -> Float8Rates:
    """Return what was measured of an architecture.

    Raises:
        InputsError: Nothing was.
    """
    if arch not in RATES:
        raise InputsError(f"FP8 was not measured on {arch}", fix=f"one of: {', '.join(RATES)}")
    return RATES[arch]
