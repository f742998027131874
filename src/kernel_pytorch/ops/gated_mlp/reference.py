"""The definition of the gated activations, in plain PyTorch, differentiable, in any floating-point dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F  # noqa: N812

__all__ = ["ACTIVATIONS", "gated_mlp_reference"]

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def gated_mlp_reference(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """Return `activation(gate) * up`, computed in float32, or float64 where an argument is, and rounded once.

    Args:
        gate: `[..., n]`.
        up: Like `gate`.
        activation: `silu` (SwiGLU), `gelu` (exact, GEGLU) or `gelu_tanh`.
    """
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (ACTIVATIONS[activation](gate.to(wide)) * up.to(wide)).to(gate.dtype)
