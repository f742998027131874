"""The definition of the product of a linear layer, in plain PyTorch, in any floating-point dtype."""

from __future__ import annotations

import torch

__all__ = ["product_reference"]


def product_reference(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, *, transpose_a: bool, transpose_b: bool
) -> torch.Tensor:
    """Return `op(a) @ op(b) + bias`.

    Args:
        a: `[rows, inner]`, or `[inner, rows]` where transposed.
        b: `[inner, columns]`, or `[columns, inner]` where transposed.
        bias: `[columns]`.
        transpose_a: Whether `op(a)` is its transpose.
        transpose_b: Whether `op(b)` is its transpose.
    """
    left, right = a.t() if transpose_a else a, b.t() if transpose_b else b
    return left @ right if bias is None else torch.addmm(bias, left, right)
