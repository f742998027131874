# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, operator"
# ruff: noqa: ANN001, ANN202, N803, PLR0917
"""Triton kernels that cast to FP8 with a scale for each row, and the transposed copy with one for each column.

Least traffic for a bfloat16 input of `n` elements, in bytes: 6 n with both copies (read 2 twice, write 1 and 1). Maxima
of rows and columns are found in one pass, by integer atomics whose order does not matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernel_pytorch._triton.launch import on_device_of
from kernel_pytorch._triton.targets import CompileCase
from kernel_pytorch.ops.float8_cast.float8_cast_kernel import (
    FP8_TARGETS_AMD,
    FP8_TARGETS_NVIDIA,
    Tile,
    byte_pair,
    magnitude,
    saturated,
    scale_for,
    speaks_ptx,
)
from kernel_pytorch.ops.float8_cast.layout import padded, whole_shape

__all__ = ["COMPILE_CASES", "cast_rows"]

_AMAX, _CAST = Tile(64, 256, 8), Tile(128, 128, 8)


@triton.jit
def float8_row_amax_kernel(x, row_amax, column_amax, rows, columns, blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(x + row[:, None] * columns + column[None, :], mask=mask, other=0.0).to(tl.float32)
    size = magnitude(value)
    if row_amax is not None:
        tl.atomic_max(row_amax + row, tl.max(size, axis=1), mask=row < rows, sem="relaxed")
    if column_amax is not None:
        tl.atomic_max(column_amax + column, tl.max(size, axis=0), mask=column < columns, sem="relaxed")


@triton.jit
def _inverse(amax, scale):
    return tl.where(magnitude(amax) < 0x7F800000, 1.0 / tl.where(scale > 0, scale, 1.0), float("nan"))


@triton.jit
def float8_cast_rows_kernel(
    x,
    row_out,
    column_out,
    row_amax,
    column_amax,
    row_inverse,
    column_inverse,
    rows,
    columns,
    row_stride,
    column_stride,
    words,
    blocks,
    limit,
    FORMAT: tl.constexpr,
    POWER_OF_2: tl.constexpr,
    PTX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    kind: tl.constexpr = tl.float8e4nv if FORMAT == "e4m3" else tl.float8e5
    program = tl.program_id(0)
    first = (program // blocks).to(tl.int64) * (ROWS // 4) + tl.arange(0, ROWS // 4)
    column = (program % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    word = tl.zeros([ROWS // 4, COLUMNS], tl.int32)
    if column_out is not None:
        by_column = tl.load(column_amax + column, mask=inside, other=0).to(tl.float32, bitcast=True)
        column_scale = scale_for(by_column, limit, POWER_OF_2)
        told = column < tl.where(program < blocks, columns, 0)
        tl.store(column_inverse + column, _inverse(by_column, column_scale), mask=told)
    for j in tl.static_range(4):
        row = first * 4 + j
        mask = (row < rows)[:, None] & inside[None, :]
        value = tl.load(x + row[:, None] * columns + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if row_out is not None:
            by_row = tl.load(row_amax + row, mask=row < rows, other=0).to(tl.float32, bitcast=True)
            row_scale = scale_for(by_row, limit, POWER_OF_2)
            small = saturated(value, row_scale[:, None], limit)
            tl.store(row_out + row[:, None] * row_stride + column[None, :], small.to(kind), mask=mask)
            row_told = row < tl.where(program % blocks == 0, rows, 0)
            tl.store(row_inverse + row, _inverse(by_row, row_scale), mask=row_told)
        if column_out is not None:
            turned = saturated(value, column_scale[None, :], limit)
            if j % 2 == 0:
                even = turned
            else:
                word |= byte_pair(even, turned, FORMAT, PTX) << (8 * (j - 1))
    if column_out is not None:
        at = column[:, None] * column_stride + first[None, :]
        tl.store(column_out + at, tl.trans(word), mask=inside[:, None] & (first < words)[None, :])


def cast_rows(
    xs: list[torch.Tensor], dtype: torch.dtype, *, row: bool, transposed: bool, power_of_2: bool, axis: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `(row, transposed, inverse, turned inverse)`; see `op.float8_cast_rows_op`."""
    rows, columns = whole_shape(xs, axis)
    xs, device = [x.contiguous() for x in xs], xs[0].device
    row_out = xs[0].new_empty((rows, columns) if row else (0,), dtype=dtype)
    column_out = xs[0].new_empty((columns, padded(rows)) if transposed else (0,), dtype=dtype)
    sizes = (rows if row else 0, columns if transposed else 0)
    inverse, turned_inverse = (torch.ones((n, 1), dtype=torch.float32, device=device) for n in sizes)
    if not rows or not columns:
        return row_out, column_out.zero_(), inverse, turned_inverse
    row_amax, column_amax = (torch.zeros(n, dtype=torch.int32, device=device) for n in sizes)
    limit = torch.finfo(dtype).max
    words = column_out.view(torch.int32) if transposed else column_out
    starts = [sum(x.shape[axis] for x in xs[:i]) for i in range(len(xs))]

    def part(vector: torch.Tensor, of: int, start: int, size: int) -> torch.Tensor:
        return vector[start : start + size] if of == axis else vector

    with on_device_of(xs[0]):
        for x, start in zip(xs, starts, strict=True):
            blocks = triton.cdiv(x.shape[1], _AMAX.columns)
            float8_row_amax_kernel[(triton.cdiv(len(x), _AMAX.rows) * blocks,)](
                x,
                part(row_amax, 0, start, len(x)) if row else None,
                part(column_amax, 1, start, x.shape[1]) if transposed else None,
                len(x),
                x.shape[1],
                blocks,
                ROWS=_AMAX.rows,
                COLUMNS=_AMAX.columns,
                num_warps=_AMAX.warps,
            )
        for i, (x, start) in enumerate(zip(xs, starts, strict=True)):
            blocks = triton.cdiv(x.shape[1], _CAST.columns)
            last = i == len(xs) - 1 or axis == 1
            below = padded(rows - (start if axis == 0 else 0)) if last else len(x)
            float8_cast_rows_kernel[(triton.cdiv(below, _CAST.rows) * blocks,)](
                x,
                row_out.narrow(axis, start, x.shape[axis]) if row else None,
                (words[start:] if axis == 1 else words[:, start // 4 :]) if transposed else None,
                part(row_amax, 0, start, len(x)) if row else None,
                part(column_amax, 1, start, x.shape[1]) if transposed else None,
                part(inverse, 0, start, len(x)) if row else None,
                part(turned_inverse, 1, start, x.shape[1]) if transposed else None,
                len(x),
                x.shape[1],
                columns,
                padded(rows) // 4,
                below // 4,
                blocks,
                limit,
                FORMAT="e4m3" if dtype is torch.float8_e4m3fn else "e5m2",
                POWER_OF_2=power_of_2,
                PTX=speaks_ptx(x),
                ROWS=_CAST.rows,
                COLUMNS=_CAST.columns,
                num_warps=_CAST.warps,
            )
    return row_out, column_out, inverse, turned_inverse


_INTEGERS = dict.fromkeys(("rows", "columns", "row_stride", "column_stride", "words", "blocks"), "i32")
_CAST_SIGNATURE = {"x": "*bf16", "row_out": "*fp8e4nv", "column_out": "*i32", "row_amax": "*i32"} | {
    "column_amax": "*i32", "row_inverse": "*fp32", "column_inverse": "*fp32", **_INTEGERS, "limit": "fp32",
}  # fmt: skip
COMPILE_CASES = [
    CompileCase(
        float8_row_amax_kernel,
        {"x": "*bf16", "row_amax": "*i32", "column_amax": "*i32", "rows": "i32", "columns": "i32", "blocks": "i32"},
        {"ROWS": _AMAX.rows, "COLUMNS": _AMAX.columns},
        _AMAX.warps,
    ),
    *(
        CompileCase(
            float8_cast_rows_kernel,
            _CAST_SIGNATURE,
            {"FORMAT": "e4m3", "POWER_OF_2": True, "PTX": ptx, "ROWS": _CAST.rows, "COLUMNS": _CAST.columns},
            _CAST.warps,
            label="" if ptx else "amd",
            targets=FP8_TARGETS_NVIDIA if ptx else FP8_TARGETS_AMD,
        )
        for ptx in (True, False)
    ),
]
