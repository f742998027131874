"""What users call: `linear_cross_entropy`, `cross_entropy`, and `unsupported`, which says where the kernels stop."""

from __future__ import annotations

from typing import Literal

import torch

from kernel_pytorch._triton.launch import as_rows, cannot_run
from kernel_pytorch.core.types import Skip
from kernel_pytorch.errors import InputsError
from kernel_pytorch.ops.linear_cross_entropy.op import chunk_rows, cross_entropy_op, linear_cross_entropy_apply
from kernel_pytorch.ops.linear_cross_entropy.reference import cross_entropy_reference, linear_cross_entropy_reference

__all__ = ["Implementation", "Reduction", "cross_entropy", "linear_cross_entropy", "unsupported"]

Implementation = Literal["triton", "reference"]
Reduction = Literal["mean", "sum", "none"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unsupported(*tensors: torch.Tensor | None) -> Skip | None:
    """Return why the kernels do not run on these tensors (hidden states or logits, weight, bias); `None` if they do."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in _DTYPES:
            return Skip(f"the kernel takes bfloat16, float16 and float32, got {tensor.dtype}")
    return cannot_run(*tensors)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    bias: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    reduction: Reduction = "mean",
    chunk: int | None = None,
    impl: Implementation | None = None,
) -> torch.Tensor:
    """Return the cross-entropy of `hidden @ weight.T + bias` without ever holding all logits, or any in fp32.

    Logits of a chunk of rows are made by one matrix product in the dtype of `hidden`; a kernel turns them into losses
    and, in place, into their gradients; two more products give the gradients of `hidden` and `weight` at once. That is
    three products in all, as without fusion, at 2 bytes a logit of a chunk instead of 14 to 18 of all of them.
    Under autocast all three are cast to its dtype, as `F.linear` does.

    Memory: a chunk's logits (1 GiB unless `chunk` says otherwise), and from the forward to the backward the gradients
    of what requires them. The weight's gradient is summed over chunks in its own dtype, or in fp32 from the ninth on.

    Args:
        hidden: `[..., H]`, bfloat16, float16 or float32 (the reference: any floating-point dtype).
        weight: `[V, H]`, the same dtype; may be tied to an embedding, and frozen.
        labels: `[...]`, integers in `[0, V)` or `ignore_index`.
        ignore_index: Label of rows that have no loss and no gradient.
        bias: `[V]`.
        label_smoothing: As of `F.cross_entropy`.
        softcap: Logits become `softcap * tanh(logits / softcap)` (Gemma 2); 0 is none.
        reduction: `mean` over the rows that count, `sum`, or `none`, whose backward computes the logits again.
        chunk: Rows at a time.
        impl: `triton`, `reference`, or `None` for the kernel where it runs.

    Returns:
        A scalar, or `[...]` for `none`; fp32 (the reference: fp64 of fp64). With `mean` and `sum` one graph can go
        backward once.

    Raises:
        InputsError: Shapes, dtypes or options do not fit, or the kernel was asked for by name and does not run here.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        to = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(to), weight.to(to)
        bias = None if bias is None else bias.to(to)
    shapes = [list(x.shape) for x in (hidden, weight, labels)]
    if (
        hidden.dim() < 1
        or weight.dim() != 2
        or hidden.shape[-1:] != weight.shape[1:]
        or labels.shape != hidden.shape[:-1]
    ):
        raise InputsError(f"linear_cross_entropy takes hidden [..., H], weight [V, H], labels [...], got {shapes}")
    if hidden.dtype != weight.dtype or (bias is not None and (bias.dtype, *bias.shape) != (weight.dtype, len(weight))):
        raise InputsError(
            f"hidden {hidden.dtype}, weight {weight.dtype} and bias [V] must have one dtype",
            fix="run it under autocast",
        )
    _check(labels, label_smoothing, softcap, reduction, impl)
    if chunk is not None and chunk < 1:
        raise InputsError(f"chunk must be 1 or more rows, got {chunk}")
    rows, targets = as_rows(hidden), labels.reshape(-1)
    if not _by_kernel(impl, hidden, weight, bias):
        loss = linear_cross_entropy_reference(
            rows, weight, targets, bias, ignore_index=ignore_index, label_smoothing=label_smoothing, softcap=softcap,
            reduction=reduction,
        )  # fmt: skip
    else:
        loss = linear_cross_entropy_apply(
            rows, weight, bias, targets.to(torch.int64).contiguous(), (ignore_index, label_smoothing, softcap),
            reduction=reduction, chunk=chunk_rows(len(rows), len(weight), hidden.element_size(), chunk),
        )  # fmt: skip
    return loss.view(labels.shape) if reduction == "none" else loss


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    reduction: Reduction = "mean",
    impl: Implementation | None = None,
) -> torch.Tensor:
    """Return the cross-entropy of logits in the dtype they have, with fp32 arithmetic and no fp32 copy.

    One read in the forward, a read and a write in the backward. For code that needs its logits anyway.

    Args:
        logits: `[..., V]`, bfloat16, float16 or float32 (the reference: any floating-point dtype).
        labels: `[...]`, integers in `[0, V)` or `ignore_index`.
        ignore_index: Label of rows that have no loss and no gradient.
        label_smoothing: As of `F.cross_entropy`.
        softcap: As of `linear_cross_entropy`.
        reduction: `mean`, `sum` or `none`.
        impl: `triton`, `reference`, or `None` for the kernel where it runs.

    Returns:
        A scalar, or `[...]` for `none`; fp32 (the reference: fp64 of fp64).

    Raises:
        InputsError: Shapes or options do not fit, or the kernel was asked for by name and does not run here.
    """
    if logits.dim() < 1 or labels.shape != logits.shape[:-1]:
        raise InputsError(f"labels must be [...] for logits [..., V], got {[*labels.shape]} and {[*logits.shape]}")
    _check(labels, label_smoothing, softcap, reduction, impl)
    rows, targets = as_rows(logits), labels.reshape(-1)
    if not _by_kernel(impl, logits):
        loss = cross_entropy_reference(
            rows, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, softcap=softcap,
            reduction=reduction,
        )  # fmt: skip
        return loss.view(labels.shape) if reduction == "none" else loss
    targets = targets.to(torch.int64).contiguous()
    losses: torch.Tensor = cross_entropy_op(rows, targets, ignore_index, label_smoothing, softcap)[0]
    if reduction == "none":
        return losses.view(labels.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / (targets != ignore_index).sum()


def _check(labels: torch.Tensor, label_smoothing: float, softcap: float, reduction: str, impl: str | None) -> None:
    if labels.is_floating_point() or labels.dtype is torch.bool:
        raise InputsError(f"labels must be integers, got {labels.dtype}")
    if not 0.0 <= label_smoothing <= 1.0 or softcap < 0.0:
        raise InputsError(f"need 0 <= label_smoothing <= 1 and softcap >= 0, got {label_smoothing} and {softcap}")
    if reduction not in ("mean", "sum", "none"):
        raise InputsError(f"unknown reduction {reduction!r}; expected mean, sum or none")
    if impl not in (None, "triton", "reference"):
        raise InputsError(f"unknown impl {impl!r}; expected 'triton', 'reference' or None")


def _by_kernel(impl: Implementation | None, *tensors: torch.Tensor | None) -> bool:
    skip = unsupported(*tensors) if impl != "reference" else None
    if impl == "triton" and skip is not None:
        raise InputsError(f"linear_cross_entropy: {skip.reason}", fix=skip.fix)
    return impl != "reference" and skip is None
