# mypy: disable-error-code="untyped-decorator"
"""Count what a cast to FP8 lost: values that saturated, that became zero, that were not finite.

An operator, so that it stays in compiled code, where the switch is looked at each time it runs. It reads its input, of
large matrices a part, so that whoever watches a training switches it on for one step in many. On a GPU one kernel
counts a matrix.
"""

from __future__ import annotations

from enum import IntEnum

import torch

__all__ = ["COLUMNS", "Column", "count_op", "counting", "switch"]


class Column(IntEnum):
    """Places of one operand's counters: numbers of elements, and the largest finite magnitude."""

    ELEMENTS = 0
    SATURATED = 1
    FLUSHED = 2
    NOT_FINITE = 3
    AMAX = 4


COLUMNS = len(Column)
_AT_MOST = 1 << 20
"""Elements of a matrix that are counted, about: of larger ones, rows that lie evenly apart."""
_ON: set[int] = set()

torch.library.define(
    "kernel_pytorch::float8_count", "(Tensor[] xs, Tensor inverse, ScalarType dtype, Tensor counters) -> Tensor"
)


def switch(counters: torch.Tensor, *, on: bool) -> None:
    """Let counters that share the memory of a tensor count from now on, or not."""
    (_ON.add if on else _ON.discard)(counters.untyped_storage().data_ptr())


def counting(counters: torch.Tensor) -> bool:
    """Return whether counters count."""
    return counters.untyped_storage().data_ptr() in _ON


@torch.no_grad()
def _count(xs: list[torch.Tensor], inverse: torch.Tensor, dtype: torch.dtype, counters: torch.Tensor) -> torch.Tensor:
    if not counting(counters):
        return inverse.clone()
    # Without a version: sums that grow are no change of what a backward will read.
    counters = counters.data
    limit = torch.finfo(dtype).max
    # Factors by row: of matrices below each other one after the other, of matrices side by side the same for each.
    by_row, stacked = inverse.dim() == 2, len(inverse) == sum(len(x) for x in xs)
    firsts = [sum(len(x) for x in xs[:i]) if stacked else 0 for i in range(len(xs))]
    for x, first in zip(xs, firsts, strict=True):
        apart = max(1, x.numel() // _AT_MOST)
        if x.is_cuda:
            from kernel_pytorch.ops.float8_cast.float8_count_kernel import count

            of_it = inverse[first : first + len(x)].contiguous() if by_row else inverse
            count(
                x.contiguous(), of_it, counters, apart=apart, limit=limit, least=_least(dtype), small=x.dtype is dtype
            )
            continue
        part = x[::apart]
        back = inverse[first : first + len(x) : apart] if by_row else inverse
        if part.dtype is dtype:
            # What the kernel that made it read is not there: the limit itself counts as saturated, a zero as lost.
            size = part.to(torch.float32).abs()
            saturated, flushed, amax = size >= limit, size == 0, size * back
        else:
            amax = part.abs().to(torch.promote_types(part.dtype, torch.float32))
            size = amax / back.to(amax.dtype)
            # Ties go to even: half of the least number becomes zero.
            saturated, flushed = size > limit, (size <= _least(dtype) / 2) & (amax > 0)
        finite = amax.isfinite()
        sums = [torch.full_like(finite, True), saturated & finite, flushed & finite, ~finite]  # noqa: FBT003
        counters[: Column.AMAX] += torch.stack([flag.sum() for flag in sums]).to(counters.dtype)
        most = torch.where(finite, amax, 0.0).amax() if amax.numel() else amax.new_zeros(())
        counters[Column.AMAX] = torch.maximum(counters[Column.AMAX], most.to(counters.dtype))
    return inverse.clone()


def _least(dtype: torch.dtype) -> float:
    found = torch.finfo(dtype)
    return found.smallest_normal * found.eps


for _kind in ("cuda", "cpu"):
    torch.library.impl("kernel_pytorch::float8_count", _kind)(_count)


@torch.library.register_fake("kernel_pytorch::float8_count")
def _count_fake(
    xs: list[torch.Tensor], inverse: torch.Tensor, dtype: torch.dtype, counters: torch.Tensor
) -> torch.Tensor:
    del xs, dtype, counters
    return torch.empty_like(inverse)


count_op = torch.ops.kernel_pytorch.float8_count
"""`(xs, inverse, dtype, counters) -> inverse`: the same factors, so that whoever uses them keeps the count.

Args of the operator:
    xs: What was cast, of one kind: matrices in their own format, or where nothing else is left in FP8 already.
    inverse: Float32 `[1]`, or `[rows, 1]`: what turns FP8 back.
    dtype: The format of FP8.
    counters: Float64 `[5]` (`Column`), written where its memory is switched on; not declared, as states are.
"""
