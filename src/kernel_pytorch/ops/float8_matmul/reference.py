"""The definition of a product of FP8 matrices, in plain PyTorch: exact on its operands but for the sum's rounding."""

from __future__ import annotations

import torch

__all__ = ["product_reference"]


def product_reference(
    a: torch.Tensor,
    b: torch.Tensor,
    inverse_a: torch.Tensor,
    inverse_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    accumulate: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Return `(a * inverse_a) @ (b * inverse_b).T + bias` in the dtype that it accumulates in.

    Args:
        a: FP8 `[rows, inner]`.
        b: FP8 `[columns, inner]`.
        inverse_a: Float32 `[1]`, or `[rows, 1]`.
        inverse_b: Float32 `[1]`, or `[columns, 1]`.
        bias: `[columns]`.
        accumulate: `torch.float64` or `torch.float32`.
    """
    product = a.to(accumulate) @ b.to(accumulate).t()
    product = product * (inverse_a.to(accumulate) * inverse_b.to(accumulate).reshape(1, -1))
    return product if bias is None else product + bias.to(accumulate)
