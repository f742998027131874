"""The dtype in which autocast would run an operator that takes its place."""

from __future__ import annotations

import torch

__all__ = ["as_autocast"]


def as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tensors as autocast casts them for `scaled_dot_product_attention`: all alike, where it is on.

    Args:
        tensors: On one device, any shapes.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)
