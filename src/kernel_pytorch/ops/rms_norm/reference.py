"""The definition of RMSNorm, in plain PyTorch, differentiable, in any floating-point dtype."""

from __future__ import annotations

import torch

__all__ = ["rms_norm_reference"]


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(y, h)` with `h = x + residual` in the dtype of `x`, and `y = h / rms(h) * (weight + weight_offset)`.

    Computed in float32, or float64 where an argument is, and rounded once to the dtype of `x`; with
    `round_before_weight` the normalised `h` is rounded first and the product takes the promoted dtype.

    Args:
        x: `[..., n]`.
        weight: `[n]`.
        eps: Added to the mean square.
        residual: Added first; like `x`.
        weight_offset: Added to the weight: 1 for Gemma.
        round_before_weight: The order of Hugging Face's `LlamaRMSNorm`.
    """
    h = x if residual is None else x + residual
    wide = torch.promote_types(torch.promote_types(h.dtype, weight.dtype), torch.float32)
    exact = h.to(wide)
    normalised = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    if round_before_weight:
        scale = weight if weight_offset == 0.0 else weight + weight_offset
        return scale * normalised.to(h.dtype), h
    return (normalised * (weight.to(wide) + weight_offset)).to(h.dtype), h
