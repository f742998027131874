"""The definition of LayerNorm, in plain PyTorch, differentiable, in any floating-point dtype."""

from __future__ import annotations

import torch

__all__ = ["layer_norm_reference"]


def layer_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(y, h)` with `h = x + residual` in the dtype of `x`, `y = (h - mean) / std * weight + bias`.

    Computed in float32, or float64 where an argument is, and rounded once to the dtype of `x`.

    Args:
        x: `[..., n]`.
        weight: `[n]`.
        bias: `[n]`, or `None` for zero.
        eps: Added to the variance, which divides by `n`.
        residual: Added first; like `x`.
    """
    h = x if residual is None else x + residual
    wide = torch.promote_types(torch.promote_types(h.dtype, weight.dtype), torch.float32)
    exact = h.to(wide)
    centred = exact - exact.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(h.dtype), h
