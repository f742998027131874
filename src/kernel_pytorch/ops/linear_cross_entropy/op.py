# mypy: disable-error-code="untyped-decorator, no-untyped-call, no-any-return"
# ruff: noqa: PLR0917, FBT001, FBT003
"""Cross-entropy of logits, and of a linear layer chunk by chunk, as operators of PyTorch with their gradients.

Scalar reductions compute the gradients of the linear layer in the forward, while a chunk's logits are there, and the
backward only multiplies by what comes from outside: recomputing them would take a fourth matrix product. With
`reduction="none"` each row has its own factor, so the backward recomputes.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from kernel_pytorch._triton.launch import INTERPRETED

__all__ = ["ROUNDED_SUMS", "chunk_rows", "cross_entropy_op", "hand_over", "linear_cross_entropy_apply"]

_KINDS = "cpu" if INTERPRETED else "cuda"
_BUFFER_BYTES = 1 << 30
"""Logits of a chunk: 4186 rows of 128256 in bf16. Matrix products of 2048 rows and more run at full rate."""
_LEAST_ROWS = 2048
ROUNDED_SUMS = 8
"""With more chunks the weight's gradient is summed in fp32, at the cost of memory: bf16 sums round once a chunk."""
_OPTIONS = "int ignore_index, float label_smoothing, float softcap"

torch.library.define("kernel_pytorch::cross_entropy", f"(Tensor logits, Tensor labels, {_OPTIONS}) -> (Tensor, Tensor)")
torch.library.define(
    "kernel_pytorch::cross_entropy_backward",
    f"(Tensor grad, Tensor logits, Tensor labels, Tensor lse, {_OPTIONS}) -> Tensor",
)
torch.library.define(
    "kernel_pytorch::linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? row_scale, "
    f"{_OPTIONS}, bool mean, int chunk, bool[3] needs) -> (Tensor, Tensor, Tensor, Tensor)",
)


def chunk_rows(rows: int, columns: int, itemsize: int, chunk: int | None = None) -> int:
    """Return the rows of a chunk: equal ones, of a buffer of 1 GiB or 2048 rows, whichever is more."""
    most = chunk or max(_LEAST_ROWS, _BUFFER_BYTES // (columns * itemsize))
    count = max(1, math.ceil(rows / most))
    return max(1, min(most, -(-math.ceil(rows / count) // 128) * 128))


@torch.library.impl("kernel_pytorch::cross_entropy", _KINDS)
def _cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, label_smoothing: float, softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from kernel_pytorch.ops.linear_cross_entropy import cross_entropy_kernel as kernel

    losses, lse = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
    kernel.launch(
        logits, labels, losses, lse, None, ignore_index=ignore_index, smoothing=label_smoothing, softcap=softcap
    )
    return losses, lse


@torch.library.impl("kernel_pytorch::cross_entropy_backward", _KINDS)
def _cross_entropy_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
) -> torch.Tensor:
    from kernel_pytorch.ops.linear_cross_entropy import cross_entropy_kernel as kernel

    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    one = torch.ones((), dtype=torch.float32, device=logits.device)
    kernel.launch(
        logits, labels, None, lse, out, scale=one, row_scale=grad.contiguous(),
        ignore_index=ignore_index, smoothing=label_smoothing, softcap=softcap,
    )  # fmt: skip
    return out


@torch.library.register_fake("kernel_pytorch::cross_entropy")
def _cross_entropy_fake(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, label_smoothing: float, softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    del ignore_index, label_smoothing, softcap
    losses, lse = (torch.empty(labels.shape, dtype=torch.float32, device=logits.device) for _ in range(2))
    return losses, lse


@torch.library.register_fake("kernel_pytorch::cross_entropy_backward")
def _cross_entropy_backward_fake(grad: torch.Tensor, logits: torch.Tensor, *_: Any) -> torch.Tensor:
    del grad
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels, *ctx.options = inputs
    ctx.save_for_backward(logits, labels, output[1])


def _gradient(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
    logits, labels, lse = ctx.saved_tensors
    slope = torch.ops.kernel_pytorch.cross_entropy_backward(grad, logits, labels, lse, *ctx.options)
    return slope, None, None, None, None


torch.library.register_autograd("kernel_pytorch::cross_entropy", _gradient, setup_context=_keep)
cross_entropy_op = torch.ops.kernel_pytorch.cross_entropy


@torch.library.impl("kernel_pytorch::linear_cross_entropy", _KINDS)
def _linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    row_scale: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    mean: bool,
    chunk: int,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from kernel_pytorch.ops.linear_cross_entropy import cross_entropy_kernel as kernel

    rows, columns = len(hidden), len(weight)
    losses, d_hidden, d_weight, d_bias = _outputs(hidden, weight, bias, needs)
    scale = torch.ones((), dtype=torch.float32, device=hidden.device)
    if mean:
        scale = (labels != ignore_index).sum().to(torch.float32).reciprocal()
    # A row stride of 16 bytes' multiple keeps accesses wide for a vocabulary such as 50257.
    padded = -(-columns // 16) * 16
    buffer = torch.empty(min(chunk, max(rows, 1)), padded, dtype=hidden.dtype, device=hidden.device)[:, :columns]
    slopes, spare = any(needs), torch.empty(len(buffer), dtype=torch.float32, device=hidden.device)
    sums = _Sums(d_weight if needs[1] else None, d_bias if needs[2] else None, -(-rows // chunk))
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        x = hidden[part]
        logits = buffer[: len(x)]
        if bias is None:
            torch.mm(x, weight.t(), out=logits)
        else:
            torch.addmm(bias, x, weight.t(), out=logits)
        kernel.launch(
            logits, labels[part], losses[part], None if slopes else spare[: len(x)], logits if slopes else None,
            scale=scale if slopes else None, row_scale=None if row_scale is None else row_scale[part],
            ignore_index=ignore_index, smoothing=label_smoothing, softcap=softcap,
        )  # fmt: skip
        if needs[0]:
            torch.mm(logits, weight, out=d_hidden[part])
        sums.add(logits, x)
    sums.finish()
    return losses, d_hidden, d_weight, d_bias


class _Sums:
    """The gradients of weight and bias, summed over chunks into their outputs."""

    def __init__(self, weight: torch.Tensor | None, bias: torch.Tensor | None, chunks: int) -> None:
        self.weight, self.bias, self.first = weight, bias, True
        rounded = chunks <= ROUNDED_SUMS or (weight is not None and weight.dtype is torch.float32)
        self.wide_weight = None if weight is None or rounded else torch.zeros_like(weight, dtype=torch.float32)
        self.wide_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        if weight is not None and not chunks:
            weight.zero_()

    def add(self, slopes: torch.Tensor, hidden: torch.Tensor) -> None:
        if self.wide_weight is not None:
            self.wide_weight.add_(torch.mm(slopes.t(), hidden))
        elif self.weight is not None and self.first:
            torch.mm(slopes.t(), hidden, out=self.weight)
        elif self.weight is not None:
            self.weight.addmm_(slopes.t(), hidden)
        if self.wide_bias is not None:
            self.wide_bias += slopes.sum(0, dtype=torch.float32)
        self.first = False

    def finish(self) -> None:
        for out, wide in ((self.weight, self.wide_weight), (self.bias, self.wide_bias)):
            if out is not None and wide is not None:
                out.copy_(wide)


def _outputs(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    like = (hidden, weight, weight[:, 0] if bias is None else bias)
    grads = [
        torch.empty(x.shape if needed else (0,), dtype=x.dtype, device=x.device)
        for x, needed in zip(like, needs, strict=True)
    ]
    return losses, grads[0], grads[1], grads[2]


@torch.library.register_fake("kernel_pytorch::linear_cross_entropy")
def _linear_cross_entropy_fake(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor,
    row_scale: torch.Tensor | None, ignore_index: int, label_smoothing: float, softcap: float, mean: bool, chunk: int,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    del labels, row_scale, ignore_index, label_smoothing, softcap, mean, chunk
    return _outputs(hidden, weight, bias, needs)


_linear_cross_entropy_op = torch.ops.kernel_pytorch.linear_cross_entropy


def hand_over(ctx: Any, grad: torch.Tensor) -> list[torch.Tensor | None]:
    """Return the gradients that a forward saved, of what needs them, times `grad`; over the count saved after them.

    In eager code they are scaled in place, so that this can be done once.
    """
    *grads, count = ctx.saved_tensors
    factor = grad.to(torch.float32) if count is None else grad.to(torch.float32) / count
    if torch.compiler.is_compiling():
        return [(g * factor).to(g.dtype) if n else None for g, n in zip(grads, ctx.needs, strict=True)]
    if ctx.spent:
        raise RuntimeError(
            "linear_cross_entropy hands its gradients over at the first backward: call it again, or use "
            "reduction='none' and sum, for a second backward through one graph"
        )
    ctx.spent = True
    for g, needed in zip(grads, ctx.needs, strict=True):
        if needed:
            _scale(g, factor)
    return [g if n else None for g, n in zip(grads, ctx.needs, strict=True)]


def _scale(x: torch.Tensor, factor: torch.Tensor) -> None:
    if not (x.is_cuda or INTERPRETED):
        # Where the kernels are emulated: one rounding and no new version, as theirs.
        x.data.copy_(x.to(torch.promote_types(x.dtype, torch.float32)) * factor)
        return
    from kernel_pytorch.ops.linear_cross_entropy import cross_entropy_kernel as kernel

    kernel.scale_(x, factor)


class _Scalar(torch.autograd.Function):
    """Sum or mean: gradients are made in the forward, and handed over, scaled in place, by the first backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        options: tuple[int, float, float],
        mean: bool,
        chunk: int,
        needs: list[bool],
    ) -> torch.Tensor:
        # Slopes over the number of rows would underflow in fp16, before a GradScaler's factor could save them.
        late = mean and hidden.dtype is torch.float16
        losses, *grads = _linear_cross_entropy_op(
            hidden, weight, bias, labels, None, *options, mean and not late, chunk, needs
        )
        count = (labels != options[0]).sum() if mean else None
        ctx.save_for_backward(*grads, count if late else None)
        ctx.needs, ctx.spent = needs, False
        total = losses.sum()
        return total if count is None else total / count

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return (*hand_over(ctx, grad), None, None, None, None, None)


class _Rows(torch.autograd.Function):
    """A loss for each row: the backward computes logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        options: tuple[int, float, float],
        chunk: int,
        needs: list[bool],
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.options, ctx.chunk, ctx.needs = options, chunk, needs
        losses: torch.Tensor = _linear_cross_entropy_op(
            hidden, weight, bias, labels, None, *options, False, chunk, [False] * 3
        )[0]
        return losses

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        _, *grads = _linear_cross_entropy_op(
            hidden, weight, bias, labels, grad.to(torch.float32).contiguous(), *ctx.options, False, ctx.chunk, ctx.needs
        )
        return (*(g if n else None for g, n in zip(grads, ctx.needs, strict=True)), None, None, None, None)


def linear_cross_entropy_apply(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    options: tuple[int, float, float],
    *,
    reduction: str,
    chunk: int,
) -> torch.Tensor:
    """Return the loss of rows `[T, H]` by the kernel; see `api.linear_cross_entropy`."""
    grad = torch.is_grad_enabled()
    needs = [grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    if reduction == "none":
        return _Rows.apply(hidden, weight, bias, labels, options, chunk, needs)
    return _Scalar.apply(hidden, weight, bias, labels, options, reduction == "mean", chunk, needs)
