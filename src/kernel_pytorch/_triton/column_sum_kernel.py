# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, operator"
# ruff: noqa: ANN001, ANN202, N803, PLR0917
"""The second stage of a split reduction: the sum of the rows of a matrix of partial sums, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernel_pytorch._triton.launch import on_device_of
from kernel_pytorch._triton.targets import CompileCase

__all__ = ["COMPILE_CASES", "column_sum"]

_COLUMNS = 32
_ROWS = 64


@triton.jit
def column_sum_kernel(partials, out, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(partials + row[:, None] * columns + column[None, :], mask=mask, other=0.0)
    tl.store(out + column, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=column < columns)


def column_sum(partials: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the sum over the rows of a contiguous float32 matrix, rounded once to `dtype`.

    Args:
        partials: `[rows, columns]`, float32, contiguous.
        dtype: Of the result, `[columns]`.
    """
    rows, columns = partials.shape
    out = torch.empty(columns, dtype=dtype, device=partials.device)
    if columns:
        with on_device_of(partials):
            column_sum_kernel[(triton.cdiv(columns, _COLUMNS),)](
                partials, out, rows, columns, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4, enable_fp_fusion=True
            )
    return out


COMPILE_CASES = [
    CompileCase(
        column_sum_kernel,
        {"partials": "*fp32", "out": "*bf16", "rows": "i32", "columns": "i32"},
        {"ROWS": _ROWS, "COLUMNS": _COLUMNS},
    )
]
