# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, operator"
# ruff: noqa: ANN001, ANN202, N803, PLR0917
"""The second stage of a split reduction: the sums of the rows of matrices of partial sums, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernel_pytorch._triton.launch import next_power_of_2, on_device_of
from kernel_pytorch._triton.targets import CompileCase

__all__ = ["COMPILE_CASES", "column_sums"]

_COLUMNS = 32
_MOST_ROWS = 512
"""Read at once: the matrix lies in L2, and what is read in turn waits for its latency each time."""


@triton.jit
def column_sum_kernel(
    partials,
    out,
    second,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    first_row = tl.program_id(1).to(tl.int64) * rows
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        total += tl.load(partials + (first_row + row)[:, None] * columns + column[None, :], mask=mask, other=0.0)
    result = tl.sum(total, axis=0).to(out.dtype.element_ty)
    if second is None or tl.program_id(1) == 0:
        tl.store(out + column, result, mask=inside)
    else:
        tl.store(second + column, result, mask=inside)


def column_sums(partials: torch.Tensor, dtype: torch.dtype, *, overlapped: bool = False) -> list[torch.Tensor]:
    """Return, for each of one or two float32 matrices, the sum over its rows, rounded once to `dtype`.

    Args:
        partials: `[1 or 2, rows, columns]`, float32, contiguous.
        dtype: Of the results, each `[columns]`.
        overlapped: Launch while the kernel before, which writes `partials`, ends; that one allows it.
    """
    matrices, rows, columns = partials.shape
    out = [torch.empty(columns, dtype=dtype, device=partials.device) for _ in range(matrices)]
    options = {"launch_pdl": True} if overlapped else {}
    with on_device_of(partials):
        column_sum_kernel[(triton.cdiv(columns, _COLUMNS), matrices)](
            partials,
            out[0],
            out[1] if matrices > 1 else None,
            rows,
            columns,
            ROWS=min(_MOST_ROWS, max(32, next_power_of_2(rows))),
            COLUMNS=_COLUMNS,
            OVERLAPPED=overlapped,
            num_warps=8,
            enable_fp_fusion=True,
            **options,
        )
    return out


def _case(second: str | None, rows: int, label: str) -> CompileCase:
    signature = {"partials": "*fp32", "out": "*bf16", "rows": "i32", "columns": "i32"}
    constants: dict[str, int | None] = {"ROWS": rows, "COLUMNS": _COLUMNS, "OVERLAPPED": False}
    if second is None:
        constants["second"] = None
    else:
        signature["second"] = second
    return CompileCase(column_sum_kernel, signature, constants, num_warps=8, label=label)


COMPILE_CASES = [_case(None, 512, "one"), _case("*bf16", 256, "two")]
