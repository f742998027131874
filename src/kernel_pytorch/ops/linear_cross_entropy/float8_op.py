# mypy: disable-error-code="untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: PLR0917, FBT001
"""Cross-entropy of a linear layer in FP8, chunk by chunk, as an operator of PyTorch with its gradients.

Input and weight come in FP8, row-major and transposed. Of each chunk of rows: a product makes its logits, a kernel
reads them for the losses, another writes their slopes in FP8 both ways, and a product makes the chunk's gradient of the
input. Of every four chunks one product makes their share of the weight's gradient. All that is a layer in FP8 and its
loss compute; what differs is that no matrix in 16 bits is of all rows by all words, that the gradient of logits is in
FP8 from the start, and that its scale is by what bounds it (`float8_slopes_kernel`), not by what it was or is.

Bytes, of `V` words, width `H` and chunks of `C` rows in 16 bits: `2 C V` of logits, `C V` of the slopes' row-major copy
and `4 C V` of the transposed one live together, and then `4 C V` and `2 V H` of the weight's gradient. With 128256,
4096 and 4096 that is 3.7 GB, and without chunks the logits of 16384 rows (4.2) live with their gradient (4.2). A
product for each chunk would hold 0.5 GB less; adding up its shares took 2.2 ms of a step on an H200
(`float8_step_all_winners.json`). From the ninth share on they are added up in float32, as in `linear_cross_entropy`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from kernel_pytorch._triton.launch import INTERPRETED
from kernel_pytorch.ops.float8_cast.api import Float8Matrix
from kernel_pytorch.ops.float8_cast.counting import count_op, counting
from kernel_pytorch.ops.float8_cast.layout import ALIGNED, padded
from kernel_pytorch.ops.float8_matmul.op import float8_matmul_op
from kernel_pytorch.ops.linear_cross_entropy.op import ROUNDED_SUMS, chunk_rows, hand_over

__all__ = ["GradientCast", "Products", "float8_chunk_rows", "float8_linear_cross_entropy_apply"]

_TOGETHER = 4
"""Chunks whose transposed slopes are kept for one product."""


class GradientCast(NamedTuple):
    """How slopes are cast.

    Attributes:
        dtype: The format.
        power_of_2: Round the scale down to a power of two.
        counters: Of a monitor, written.
    """

    dtype: torch.dtype
    power_of_2: bool = False
    counters: torch.Tensor | None = None


class Products(NamedTuple):
    """How products run.

    Attributes:
        dtype: Of logits and slopes: bfloat16, float16 or float32.
        fast: Of logits, input's gradient and weight's gradient: sums in the tensor cores' own accumulators.
        measured: By measured algorithms of cuBLASLt.
    """

    dtype: torch.dtype
    fast: tuple[bool, bool, bool]
    measured: bool


torch.library.define(
    "kernel_pytorch::float8_linear_cross_entropy",
    "(Tensor x, Tensor x_turned, Tensor x_inverse, Tensor w, Tensor w_turned, Tensor w_inverse, Tensor? bias, "
    "Tensor labels, Tensor? counters, ScalarType kind, bool power_of_2, ScalarType to, "
    "ScalarType x_dtype, ScalarType w_dtype, bool[3] fast, bool measured, int ignore_index, bool mean, int chunk, "
    "bool[3] needs) -> (Tensor, Tensor, Tensor, Tensor)",
)


def float8_chunk_rows(rows: int, columns: int, itemsize: int, chunk: int | None = None) -> int:
    """Return the rows of a chunk, a multiple of 16: chunks of transposed copies begin where products can read them."""
    return max(ALIGNED, chunk_rows(rows, columns, itemsize, chunk) // ALIGNED * ALIGNED)


def _chunks(
    x: torch.Tensor,
    x_turned: torch.Tensor,
    x_inverse: torch.Tensor,
    w: torch.Tensor,
    w_turned: torch.Tensor,
    w_inverse: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    counters: torch.Tensor | None,
    kind: torch.dtype,
    power_of_2: bool,
    to: torch.dtype,
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
    fast: list[bool],
    measured: bool,
    ignore_index: int,
    mean: bool,
    chunk: int,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = len(x), len(w)
    scale = torch.ones((), dtype=torch.float32, device=x.device)
    if mean:
        scale = (labels != ignore_index).sum().to(torch.float32).reciprocal()
    losses = torch.empty(rows, dtype=torch.float32, device=x.device)
    inverse = torch.ones(1, dtype=torch.float32, device=x.device)
    together = chunk * _TOGETHER
    d_x: list[torch.Tensor] = []
    d_w: torch.Tensor | None = None
    if needs[1] and (not rows or -(-rows // together) > ROUNDED_SUMS):
        d_w = torch.zeros(w.shape, dtype=torch.float32, device=x.device)
    d_bias = torch.zeros(columns if needs[2] else 0, dtype=torch.float32, device=x.device)
    for begin in range(0, rows, together):
        end = min(begin + together, rows)
        turned = x.new_empty((columns, padded(end - begin)), dtype=kind) if needs[1] else None
        for start in range(begin, end, chunk):
            part = slice(start, min(start + chunk, end))
            logits = float8_matmul_op(x[part], w, x_inverse, w_inverse, bias, to, fast[0], measured)
            row = torch.empty_like(logits, dtype=kind) if needs[0] else None
            here = None if turned is None else turned[:, start - begin : start - begin + padded(part.stop - start)]
            counted = counters if (needs[0] or needs[1]) and counters is not None and counting(counters) else None
            wide = needs[2] or counted is not None
            _slopes(logits, labels[part], losses[part], scale, row, here, inverse, power_of_2, ignore_index, wide)
            if needs[2]:
                d_bias += logits.sum(0, dtype=torch.float32)
            if counted is not None:
                count_op([logits], inverse, kind, counted)
            del logits
            if row is not None:
                d_x.append(float8_matmul_op(row, w_turned, inverse, w_inverse, None, x_dtype, fast[1], measured))
            del row
        if turned is not None:
            # Adjacent columns, as algorithms are measured: of all rows no copy, of a part H bytes a row.
            x_part = x_turned[:, begin : begin + turned.shape[1]].contiguous()
            share = float8_matmul_op(turned, x_part, inverse, x_inverse, None, w_dtype, fast[2], measured)
            d_w = share if d_w is None else d_w.add_(share)
            del share
        del turned
    if len(d_x) == 1:
        d_hidden = d_x[0]
    else:
        d_hidden = torch.cat(d_x) if d_x else x.new_empty(x.shape if needs[0] else (0,), dtype=x_dtype)
    d_weight = x.new_empty((0,), dtype=w_dtype) if d_w is None else d_w.to(w_dtype)
    return losses, d_hidden, d_weight, d_bias


def _slopes(
    logits: torch.Tensor,
    labels: torch.Tensor,
    losses: torch.Tensor,
    scale: torch.Tensor,
    row: torch.Tensor | None,
    turned: torch.Tensor | None,
    inverse: torch.Tensor,
    power_of_2: bool,
    ignore_index: int,
    wide: bool,
) -> None:
    """Write losses, and slopes of `scale` times their sum to the copies in FP8; `wide`: in the place of logits too."""
    copies = [copy for copy in (row, turned) if copy is not None]
    if not (logits.is_cuda or INTERPRETED):
        from kernel_pytorch.ops.linear_cross_entropy.reference import float8_slopes_reference, slopes_reference

        found, slopes = slopes_reference(logits, labels, ignore_index=ignore_index)
        losses.copy_(found)
        slopes = (slopes * torch.where(scale.isfinite(), scale, 1.0)).to(logits.dtype)
        if copies:
            small, back = float8_slopes_reference(slopes, scale, copies[0].dtype, power_of_2=power_of_2)
            inverse.copy_(back)
            if row is not None:
                row.copy_(small)
            if turned is not None:
                turned.zero_()[:, : len(small)].copy_(small.t())
        if wide:
            logits.copy_(slopes)
        return
    from kernel_pytorch.ops.linear_cross_entropy import cross_entropy_kernel, float8_slopes_kernel

    lse = torch.empty_like(losses)
    cross_entropy_kernel.launch(logits, labels, losses, lse, None, ignore_index=ignore_index)
    if copies:
        float8_slopes_kernel.slopes(
            logits, labels, lse, scale, row, turned, inverse, power_of_2=power_of_2, ignore_index=ignore_index
        )
    if wide:
        cross_entropy_kernel.launch(logits, labels, None, lse, logits, scale=scale, ignore_index=ignore_index)


for _device in ("cuda", "cpu"):
    torch.library.impl("kernel_pytorch::float8_linear_cross_entropy", _device)(_chunks)


@torch.library.register_fake("kernel_pytorch::float8_linear_cross_entropy")
def _chunks_fake(
    x: torch.Tensor, x_turned: torch.Tensor, x_inverse: torch.Tensor, w: torch.Tensor, w_turned: torch.Tensor,
    w_inverse: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor,
    counters: torch.Tensor | None, kind: torch.dtype, power_of_2: bool, to: torch.dtype, x_dtype: torch.dtype,
    w_dtype: torch.dtype, fast: list[bool], measured: bool, ignore_index: int, mean: bool, chunk: int,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    del x_turned, x_inverse, w_turned, w_inverse, bias, labels, counters, kind, power_of_2, fast, measured
    del ignore_index, mean, chunk
    del to
    shapes = ((x.shape, x_dtype), (w.shape, w_dtype), (w.shape[:1], torch.float32))
    grads = [x.new_empty(shape if needed else (0,), dtype=d) for (shape, d), needed in zip(shapes, needs, strict=True)]
    return x.new_empty((len(x),), dtype=torch.float32), grads[0], grads[1], grads[2]


class _Scalar(torch.autograd.Function):
    """As `_Scalar` of `linear_cross_entropy`: gradients are made in the forward, and handed over by the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        small: Any,
        labels: torch.Tensor,
        counters: torch.Tensor | None,
        options: Any,
        needs: list[bool],
    ) -> torch.Tensor:
        x, x_turned, x_inverse, w, w_turned, w_inverse = small
        kind, power_of_2, to, fast, measured, ignore_index, mean, chunk = options
        # Slopes over the number of rows would underflow in fp16, before a GradScaler's factor could save them.
        late = mean and to is torch.float16
        losses, d_hidden, d_weight, d_bias = torch.ops.kernel_pytorch.float8_linear_cross_entropy(
            x, x_turned, x_inverse, w, w_turned, w_inverse, None if bias is None else bias.to(to), labels,
            counters, kind, power_of_2, to, hidden.dtype, weight.dtype, fast, measured, ignore_index,
            mean and not late, chunk, needs,
        )  # fmt: skip
        count = (labels != ignore_index).sum() if mean else None
        if bias is not None:
            d_bias = d_bias.to(bias.dtype)
        ctx.save_for_backward(d_hidden, d_weight, d_bias, count if late else None)
        ctx.needs, ctx.spent = needs, False
        total = losses.sum()
        return total if count is None else total / count

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return (*hand_over(ctx, grad), None, None, None, None, None)


def float8_linear_cross_entropy_apply(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    x8: Float8Matrix,
    w8: Float8Matrix,
    cast: GradientCast,
    products: Products,
    *,
    ignore_index: int,
    reduction: str,
    chunk: int | None = None,
) -> torch.Tensor:
    """Return the loss of rows, `mean` or `sum`, in float32, of products in FP8; one graph can go backward once.

    Args:
        hidden: `[T, H]`: what the input's gradient is for.
        weight: `[V, H]`, likewise; 16 divides both sizes.
        bias: `[V]`.
        labels: `[T]`, int64, contiguous.
        x8: `hidden` in FP8 under one scale, transposed where the weight's gradient is wanted.
        w8: `weight` in FP8 under one scale, transposed where the input's gradient is wanted.
        cast: Of slopes, to FP8.
        products: How they run.
        ignore_index: Label of rows that have no loss and no gradient.
        reduction: `mean` over the rows that count, or `sum`.
        chunk: Rows at a time, rounded down to a multiple of 16.
    """
    grad = torch.is_grad_enabled()
    needs = [grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    rows = float8_chunk_rows(len(hidden), len(weight), products.dtype.itemsize, chunk)
    options = (
        cast.dtype, cast.power_of_2, products.dtype, list(products.fast), products.measured, ignore_index,
        reduction == "mean", rows,
    )  # fmt: skip
    small = (x8.row, x8.transposed, x8.inverse, w8.row, w8.transposed, w8.inverse)
    return _Scalar.apply(hidden, weight, bias, small, labels, cast.counters, options, needs)
