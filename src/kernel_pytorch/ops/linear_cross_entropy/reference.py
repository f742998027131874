"""The definitions, in plain PyTorch, for any float dtype; fp64 is the oracle."""

from __future__ import annotations

import torch
from torch.nn import functional

from kernel_pytorch.ops.float8_cast.reference import quantise, scale_reference

__all__ = ["cross_entropy_reference", "float8_slopes_reference", "linear_cross_entropy_reference", "slopes_reference"]


def cross_entropy_reference(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """Return `F.cross_entropy` of `logits` `[rows, columns]` in fp32 (fp64 stays), capped as Gemma 2 caps them."""
    wide = logits if logits.dtype is torch.float64 else logits.float()
    if softcap:
        wide = softcap * torch.tanh(wide / softcap)
    return functional.cross_entropy(
        wide, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """Return the cross-entropy of `hidden [T, H] @ weight [V, H].T + bias`, with all logits in memory."""
    return cross_entropy_reference(
        functional.linear(hidden, weight, bias), labels, ignore_index=ignore_index, label_smoothing=label_smoothing,
        softcap=softcap, reduction=reduction,
    )  # fmt: skip


def slopes_reference(
    logits: torch.Tensor, labels: torch.Tensor, *, ignore_index: int = -100
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses of rows in fp32, 0 where ignored, and the gradients of their sum, not rounded to 16 bits."""
    wide = logits if logits.dtype is torch.float64 else logits.float()
    used = labels != ignore_index
    losses = functional.cross_entropy(wide, labels, ignore_index=ignore_index, reduction="none")
    slopes = torch.softmax(wide, 1)
    slopes[used.nonzero(as_tuple=True)[0], labels[used]] -= 1.0
    return losses.float(), torch.where(used[:, None], slopes, 0.0)


def float8_slopes_reference(
    slopes: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, *, power_of_2: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return slopes that are at most `factor` in a format of 8 bits, and the number that turns them back.

    Args:
        slopes: `[rows, columns]`: gradients of the sum of losses times `factor`.
        factor: One number, fp32; infinite where no row counts.
        dtype: The format.
        power_of_2: Round the scale down to a power of two.
    """
    scale = scale_reference(torch.where(factor.isfinite(), factor, 1.0), dtype, power_of_2=power_of_2)
    return quantise(slopes, scale, dtype), 1.0 / scale
