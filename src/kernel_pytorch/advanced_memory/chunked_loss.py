# mypy: disable-error-code="no-untyped-call"
"""The cross-entropy of a linear layer's logits, chunk by chunk of rows, in plain PyTorch: for compilers of whole steps.

Where Triton runs, `ops/linear_cross_entropy` does the same with a kernel. Here the logits, losses and gradients of one
chunk after the other are made, with a barrier between, so that a compiler keeps one chunk alive at a time. Gradients
are computed in the forward, while the logits are there: three matrix products in all, as without chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kernel_pytorch.advanced_memory.barrier import hold_apart

__all__ = ["chunked_cross_entropy"]


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    rows: int = 1024,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    spread: bool = False,
) -> torch.Tensor:
    """Return `F.cross_entropy((hidden @ weight.T + bias).float(), labels)` without all logits at once.

    Args:
        hidden: `[T, H]`, any floating-point dtype.
        weight: `[V, H]`, the same dtype; may be tied and frozen. Its gradient is summed over chunks in fp32 at least.
        labels: `[T]`, integers in `[0, V)` or `ignore_index`.
        bias: `[V]`.
        rows: Rows of a chunk.
        ignore_index: Label of rows that have no loss and no gradient.
        label_smoothing: As of `F.cross_entropy`.
        reduction: `mean` over the rows that count, or `sum`.
        spread: Rows lie spread over devices (`rows_mark`): a chunk takes every n-th row, so that each device has its
            share of every chunk; `T` must then be a multiple of the number of chunks, or they are taken in order.

    Returns:
        A scalar in fp32 (fp64 of fp64).
    """
    assert reduction in ("mean", "sum"), reduction
    assert rows > 0, rows
    options = (_parts(len(hidden), rows, spread), ignore_index, label_smoothing, reduction == "mean")
    with torch.autocast(hidden.device.type, enabled=False):
        loss: torch.Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, labels, *options)
    return loss


@dataclass(frozen=True, slots=True)
class _Parts:
    """How rows are cut into chunks: in order, or (`strided`) every n-th row to one."""

    rows: int
    count: int
    strided: bool

    def cut(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        if self.strided:
            return list(tensor.unflatten(0, (-1, self.count)).unbind(1))
        return list(tensor.split(self.rows))

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(parts, 1).flatten(0, 1) if self.strided else torch.cat(parts)


def _parts(length: int, rows: int, spread: bool) -> _Parts:  # noqa: FBT001
    count = max(1, -(-length // rows))
    return _Parts(rows, count, spread and length % count == 0)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        parts: _Parts,
        ignore_index: int,
        smoothing: float,
        mean: bool,  # noqa: FBT001
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        counted = labels != ignore_index
        scale = counted.sum().to(wide).reciprocal() if mean else torch.ones((), dtype=wide, device=hidden.device)
        needs = [x is not None and x.requires_grad for x in (hidden, weight, bias)]
        sums = [torch.zeros((), dtype=wide, device=hidden.device)]
        sums += [torch.zeros(weight.shape, dtype=wide, device=weight.device)] if needs[1] else []
        sums += [torch.zeros(weight.shape[:1], dtype=wide, device=weight.device)] if needs[2] else []
        slopes: list[torch.Tensor] = []
        cuts = zip(parts.cut(hidden), parts.cut(labels), parts.cut(counted), strict=True)
        for i, (rows, targets, known) in enumerate(cuts):
            x = rows
            if i:
                x, *sums = hold_apart([x, *sums])
            if parts.strided:
                (x,) = hold_apart([x])
            logits = torch.nn.functional.linear(x, weight, bias).to(wide)
            loss, slope = _loss_and_slope(logits, targets, known, smoothing)
            sums[0] = sums[0] + loss
            slope = (slope * scale).to(hidden.dtype)
            if needs[0]:
                slopes.append(slope @ weight)
            if needs[1]:
                sums[1] = sums[1] + (slope.t() @ x).to(wide)
            if needs[2]:
                sums[-1] = sums[-1] + slope.to(wide).sum(0)
        grads: list[torch.Tensor | None] = [parts.join(slopes) if needs[0] else None]
        grads.append(sums[1].to(weight.dtype) if needs[1] else None)
        grads.append(sums[-1].to(weight.dtype) if needs[2] else None)
        ctx.save_for_backward(*grads)
        return sums[0] * scale

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = (None if g is None else (g * grad).to(g.dtype) for g in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None)


def _loss_and_slope(
    logits: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the rows' losses and its gradient to the logits `[T, V]`."""
    columns = logits.shape[1]
    shifted = logits - logits.amax(1, keepdim=True)
    exps = shifted.exp()
    total = exps.sum(1, keepdim=True)
    hit = torch.arange(columns, device=logits.device) == labels[:, None]
    target = hit.to(logits.dtype) * (1.0 - smoothing) + smoothing / columns
    losses = total.log().squeeze(1) - (shifted * target).sum(1)
    keep = counted.to(logits.dtype)
    return (losses * keep).sum(), (exps / total - target) * keep[:, None]
