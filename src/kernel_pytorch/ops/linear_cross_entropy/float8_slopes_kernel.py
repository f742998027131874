# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, operator"
# ruff: noqa: ANN001, ANN202, N803, PLR0917
"""Triton kernel that turns logits into their gradient in FP8, row-major and transposed, which is never written wider.

No slope of a cross-entropy is larger than the factor that losses are summed with (softmax less one is in [-1, 1]), and
where a target's probability is small it is about as large: the scale is known before, and nothing looks for a maximum.

Least traffic for `n` logits in 16 bits, in bytes: 4 n with both copies (read 2, write 1 and 1); to write the gradient
in the place of the logits and to cast it takes 8 n. The transposition is that of `float8_cast`.
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
    saturated,
    scale_for,
    speaks_ptx,
)
from kernel_pytorch.ops.float8_cast.layout import padded

__all__ = ["COMPILE_CASES", "slopes"]

_LOG2_E = 1.4426950408889634


@triton.jit
def float8_slopes_kernel(
    logits,
    labels,
    lse,
    factor,
    row_out,
    column_out,
    inverse_out,
    rows,
    columns,
    column_stride,
    words,
    blocks,
    ignore_index,
    limit,
    log2_e,
    FORMAT: tl.constexpr,
    POWER_OF_2: tl.constexpr,
    PTX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Cast the slopes of a tile; `column_out` is the transposed copy as words of four rows."""
    kind: tl.constexpr = tl.float8e4nv if FORMAT == "e4m3" else tl.float8e5
    program = tl.program_id(0)
    share = tl.load(factor)
    share = tl.where(share < float("inf"), share, 1.0)  # no row counts: all slopes are zero
    scale = scale_for(share, limit, POWER_OF_2)
    first = (program // blocks).to(tl.int64) * (ROWS // 4) + tl.arange(0, ROWS // 4)
    column = (program % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < columns)[None, :]
    word = tl.zeros([ROWS // 4, COLUMNS], tl.int32)
    for j in tl.static_range(4):
        row = first * 4 + j
        there = row < rows
        label = tl.load(labels + row, mask=there, other=ignore_index)
        used = label != ignore_index
        peak = tl.load(lse + row, mask=used & there, other=0.0)
        mask = (used & there)[:, None] & inside
        x = tl.load(logits + row[:, None] * columns + column[None, :], mask=mask, other=float("-inf")).to(tl.float32)
        slope = tl.exp2((x - peak[:, None]) * log2_e)
        hit = (column[None, :] == label[:, None]) & used[:, None]
        slope = tl.where(hit, slope - 1.0, slope) * share
        # Rounded as a gradient of logits is: what a layer in FP8 casts.
        small = saturated(slope.to(logits.dtype.element_ty).to(tl.float32), scale, limit)
        if row_out is not None:
            at = row[:, None] * columns + column[None, :]
            tl.store(row_out + at, small.to(kind), mask=there[:, None] & inside)
        if column_out is not None:
            if j % 2 == 0:
                even = small
            else:
                word |= byte_pair(even, small, FORMAT, PTX) << (8 * (j - 1))
    if column_out is not None:
        at = column[:, None] * column_stride + first[None, :]
        tl.store(column_out + at, tl.trans(word), mask=(column < columns)[:, None] & (first < words)[None, :])
    if program == 0:
        tl.store(inverse_out, 1.0 / scale)


def slopes(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    factor: torch.Tensor,
    row_out: torch.Tensor | None,
    column_out: torch.Tensor | None,
    inverse: torch.Tensor,
    *,
    power_of_2: bool,
    ignore_index: int,
) -> None:
    """Write the gradient of `factor * losses.sum()` in FP8.

    Args:
        logits: `[rows, columns]`, contiguous, 16 or 32 bits.
        labels: `[rows]` int64.
        lse: `[rows]` fp32, log of the sum of exponentials.
        factor: One fp32 number on the device.
        row_out: FP8 `[rows, columns]`, contiguous, written; or `None`.
        column_out: FP8 `[columns, padded(rows)]`, rows of whole words of 4 bytes, possibly columns of a larger matrix;
            written, zero beyond `rows`; or `None`. At least one copy is wanted.
        inverse: Fp32 `[1]`, written: what turns the copies back.
        power_of_2: Round the scale down to a power of two.
        ignore_index: Label of rows without gradient.
    """
    rows, columns = logits.shape
    if not rows or not columns:
        inverse.fill_(1.0)
        return
    wanted = row_out if column_out is None else column_out
    assert wanted is not None
    words = None if column_out is None else column_out.view(torch.int32)
    tile = Tile()
    blocks = triton.cdiv(columns, tile.columns)
    with on_device_of(logits):
        float8_slopes_kernel[(triton.cdiv(padded(rows), tile.rows) * blocks,)](
            logits, labels, lse, factor, row_out, words, inverse, rows, columns,
            0 if words is None else words.stride(0), padded(rows) // 4, blocks, ignore_index,
            torch.finfo(wanted.dtype).max, _LOG2_E,
            FORMAT="e4m3" if wanted.dtype is torch.float8_e4m3fn else "e5m2", POWER_OF_2=power_of_2,
            PTX=speaks_ptx(logits), ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
        )  # fmt: skip


def _case(kind: str, form: str, label: str, *, row: bool = True, column: bool = True, ptx: bool = True) -> CompileCase:
    small = "*fp8e4nv" if form == "e4m3" else "*fp8e5"
    signature = {"logits": f"*{kind}", "labels": "*i64", "lse": "*fp32", "factor": "*fp32", "inverse_out": "*fp32"}
    constants: dict[str, object] = {
        "FORMAT": form, "POWER_OF_2": True, "PTX": ptx, "ROWS": Tile().rows, "COLUMNS": Tile().columns,
    }  # fmt: skip
    for name, wanted, what in (("row_out", row, small), ("column_out", column, "*i32")):
        if wanted:
            signature[name] = what
        else:
            constants[name] = None
    integers = dict.fromkeys(("rows", "columns", "column_stride", "words", "blocks", "ignore_index"), "i32")
    return CompileCase(
        float8_slopes_kernel, signature | integers | {"limit": "fp32", "log2_e": "fp32"}, constants, Tile().warps,
        label=label, targets=FP8_TARGETS_NVIDIA if ptx else FP8_TARGETS_AMD,
    )  # fmt: skip


COMPILE_CASES = [
    _case("bf16", "e5m2", "both"),
    _case("fp32", "e4m3", "both, float32"),
    _case("bf16", "e5m2", "row", column=False),
    _case("bf16", "e5m2", "transposed", row=False),
    _case("bf16", "e5m2", "amd", ptx=False),
]
