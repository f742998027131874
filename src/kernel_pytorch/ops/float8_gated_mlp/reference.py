# ruff: noqa: PLR0917
"""The definition of gated activations in FP8, in plain PyTorch: the activation in float32 or wider, then the cast."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from kernel_pytorch.ops.float8_cast.layout import padded
from kernel_pytorch.ops.float8_cast.reference import cast_reference, quantise
from kernel_pytorch.ops.gated_mlp.reference import gated_mlp_reference

__all__ = ["backward_reference", "forward_reference"]


def forward_reference(
    gate_up: torch.Tensor,
    state: torch.Tensor | None,
    dtype: torch.dtype,
    activation: str,
    *,
    update: bool,
    roll: bool,
    power_of_2: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(row, inverse)`; see `op.float8_gated_mlp_op`."""
    gate, up = _wide(gate_up).chunk(2, 1)
    row, _, inverse = cast_reference(
        [gated_mlp_reference(gate, up, activation)], state, dtype, row=True, transposed=False, update=update,
        roll=roll, power_of_2=power_of_2,
    )  # fmt: skip
    return row, inverse


def backward_reference(
    grad: torch.Tensor,
    gate_up: torch.Tensor,
    state: torch.Tensor | None,
    inverse: torch.Tensor,
    dtypes: tuple[torch.dtype, torch.dtype],
    activation: str,
    *,
    row: bool,
    transposed: bool,
    again: bool,
    power_of_2: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `(row, transposed, inverse, product transposed)`; see `op.float8_gated_mlp_backward_op`."""
    gate, up = _wide(gate_up).chunk(2, 1)
    active, slope = _active(gate, activation)
    product, wide = active * up, grad.to(gate.dtype)
    cast = cast_reference(
        [wide * up * slope, wide * active], state, dtypes[0], row=row, transposed=transposed, update=True, roll=True,
        power_of_2=power_of_2,
        axis=1,
    )  # fmt: skip
    turned = grad.new_empty((0,), dtype=dtypes[1])
    if again:
        bits = quantise(product, inverse.reciprocal(), dtypes[1]).view(torch.uint8).t()
        turned = functional.pad(bits, (0, padded(len(grad)) - len(grad))).contiguous().view(dtypes[1])
    return *cast, turned


def _active(x: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an activation and its derivative."""
    if activation == "silu":
        share = torch.sigmoid(x)
        return x * share, share * (1 + x * (1 - share))
    if activation == "gelu":
        share = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return x * share, share + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    factor = 2 * math.sqrt(2 / math.pi)
    share = torch.sigmoid(factor * (x + 0.044715 * x**3))
    return x * share, share + x * share * (1 - share) * factor * (1 + 3 * 0.044715 * x * x)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
