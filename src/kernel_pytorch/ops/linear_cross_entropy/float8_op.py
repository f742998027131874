# mypy: disable-error-code="untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: PLR0917, FBT001
"""Cross-entropy of a linear layer in FP8, chunk by chunk, as an operator of PyTorch with its gradients.

Input and weight come in FP8, row-major and transposed. Of each chunk of rows: a product makes its logits, the kernel of
`linear_cross_entropy` turns them into losses and in place into slopes, one pass casts those to FP8 both ways, and two
products make the chunk's gradient of the input and its share of the weight's. All that is a layer in FP8 and its loss
compute, in the same order; what differs is that no matrix is of all rows by all words.

Bytes, of `R` rows, `V` words, width `H` and chunks of `C` rows in 16 bits: `2 C V` of logits, `2 C V` of the slopes'
copies in FP8 and `2 V H` of the weight's gradient live together, and then, with the logits and one copy gone, `C V` and
twice `2 V H`. With 16384, 128256, 4096 and 4096 that is 3.2 GB; without chunks the gradient of all logits (4.2) lives
with the logits (4.2) and then with its two copies (4.2). Keeping the transposed copies of all chunks for one product in
the end (`R V`, 2.1 GB) would save the passes that add shares up, `6 V H` a chunk after the first (9.5 GB, 2.3 ms by the
bandwidth that an H200 copies at), and hold 1 GB more: memory comes first here. From the ninth chunk on shares are added
up in float32, as in `linear_cross_entropy`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from kernel_pytorch._triton.launch import INTERPRETED
from kernel_pytorch.ops.float8_cast.api import Float8Matrix
from kernel_pytorch.ops.float8_cast.counting import count_op
from kernel_pytorch.ops.float8_cast.layout import ALIGNED, padded
from kernel_pytorch.ops.float8_cast.op import float8_cast_op
from kernel_pytorch.ops.float8_matmul.op import float8_matmul_op
from kernel_pytorch.ops.linear_cross_entropy.op import ROUNDED_SUMS, chunk_rows, hand_over

__all__ = ["GradientCast", "Products", "float8_chunk_rows", "float8_linear_cross_entropy_apply"]


class GradientCast(NamedTuple):
    """How slopes are cast.

    Attributes:
        dtype: The format.
        state: Of the delayed scale, written: it moves at the first chunk, and takes note of all. `None`: each chunk
            has a scale by its own largest magnitude.
        power_of_2: Round scales down to powers of two.
        counters: Of a monitor, written.
    """

    dtype: torch.dtype
    state: torch.Tensor | None = None
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
    "Tensor labels, Tensor? state, Tensor? counters, ScalarType kind, bool power_of_2, ScalarType to, "
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
    state: torch.Tensor | None,
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
    d_x: list[torch.Tensor] = []
    d_w: torch.Tensor | None = None
    if needs[1] and (not rows or -(-rows // chunk) > ROUNDED_SUMS):
        d_w = torch.zeros(w.shape, dtype=torch.float32, device=x.device)
    d_bias = torch.zeros(columns if needs[2] else 0, dtype=torch.float32, device=x.device)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        logits = float8_matmul_op(x[part], w, x_inverse, w_inverse, bias, to, fast[0], measured)
        _turn_into_slopes(logits, labels[part], losses[part], scale if any(needs) else None, ignore_index)
        if needs[2]:
            d_bias += logits.sum(0, dtype=torch.float32)
        if not (needs[0] or needs[1]):
            continue
        role = "forward" if start == 0 else "note"
        row, turned, inverse = float8_cast_op([logits], state, kind, needs[0], needs[1], role, power_of_2)
        if counters is not None:
            inverse = count_op([logits], inverse, kind, counters)
        del logits
        if needs[0]:
            d_x.append(float8_matmul_op(row, w_turned, inverse, w_inverse, None, x_dtype, fast[1], measured))
        del row
        if needs[1]:
            # Adjacent columns, as algorithms are measured: of one chunk no copy, of several H bytes a row.
            x_part = x_turned[:, start : start + padded(part.stop - start)].contiguous()
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


def _turn_into_slopes(
    logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, scale: torch.Tensor | None, ignore_index: int
) -> None:
    """Write losses, and in the place of logits their slopes times `scale`, where there is one."""
    if not (logits.is_cuda or INTERPRETED):
        from kernel_pytorch.ops.linear_cross_entropy.reference import slopes_reference

        found, slopes = slopes_reference(logits, labels, ignore_index=ignore_index)
        losses.copy_(found)
        if scale is not None:
            logits.copy_(slopes * scale)
        return
    from kernel_pytorch.ops.linear_cross_entropy import cross_entropy_kernel as kernel

    lse = torch.empty_like(losses) if scale is None else None
    kernel.launch(
        logits, labels, losses, lse, None if scale is None else logits, scale=scale, ignore_index=ignore_index
    )


for _device in ("cuda", "cpu"):
    torch.library.impl("kernel_pytorch::float8_linear_cross_entropy", _device)(_chunks)


@torch.library.register_fake("kernel_pytorch::float8_linear_cross_entropy")
def _chunks_fake(
    x: torch.Tensor, x_turned: torch.Tensor, x_inverse: torch.Tensor, w: torch.Tensor, w_turned: torch.Tensor,
    w_inverse: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, state: torch.Tensor | None,
    counters: torch.Tensor | None, kind: torch.dtype, power_of_2: bool, to: torch.dtype, x_dtype: torch.dtype,
    w_dtype: torch.dtype, fast: list[bool], measured: bool, ignore_index: int, mean: bool, chunk: int,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    del x_turned, x_inverse, w_turned, w_inverse, bias, labels, state, counters, kind, power_of_2, fast, measured
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
        of_gradient: Any,
        options: Any,
        needs: list[bool],
    ) -> torch.Tensor:
        x, x_turned, x_inverse, w, w_turned, w_inverse = small
        state, counters = of_gradient
        kind, power_of_2, to, fast, measured, ignore_index, mean, chunk = options
        # Slopes over the number of rows would underflow in fp16, before a GradScaler's factor could save them.
        late = mean and to is torch.float16
        losses, d_hidden, d_weight, d_bias = torch.ops.kernel_pytorch.float8_linear_cross_entropy(
            x, x_turned, x_inverse, w, w_turned, w_inverse, None if bias is None else bias.to(to), labels, state,
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
    return _Scalar.apply(hidden, weight, bias, small, labels, (cast.state, cast.counters), options, needs)
