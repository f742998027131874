"""The definition of the gated activations, in plain PyTorch, differentiable, in any floating-point dtype."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["ACTIVATIONS", "gated_mlp_reference"]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def gated_mlp_reference(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """Return `activation(gate) * up`, computed in float32, or float64 where an argument is, and rounded once.

    Args:
        gate: `[..., n]`.
        up: Like `gate`.
        activation: `silu` (SwiGLU), `gelu` (exact, GEGLU) or `gelu_tanh`.
    """
    wide = torch.promote_types(gate.dtype, torch.float32)
    x, u = gate.to(wide), up.to(wide)
    if activation == "silu":
        return (nn.functional.silu(x) * u).to(gate.dtype)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return (nn.functional.gelu(x, approximate=approximate) * u).to(gate.dtype)
