# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, operator"
# ruff: noqa: ANN001, ANN202, N803, PLR0917
"""Triton kernels of RMSNorm: a row lies in the registers of one program, so memory is touched once.

Least traffic, in units of the bytes of `x`: forward 2 (read x, write y), with residual 4; backward 3 (read h and dy,
write dx), with residual 4. The gradient of the weight is summed over rows by a fixed number of programs, each over
its own rows in a fixed order, and then over the programs: the same bits in every run on one kind of GPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl

from kernel_pytorch._triton.column_sum_kernel import column_sums
from kernel_pytorch._triton.launch import (
    Launch,
    as_rows,
    can_overlap,
    looping_launch,
    multiprocessors,
    next_power_of_2,
    on_device_of,
    resident_options,
    shared_bytes,
    tile_launch,
)
from kernel_pytorch._triton.rows import keep, load_rows
from kernel_pytorch._triton.targets import CompileCase

__all__ = ["COMPILE_CASES", "backward", "backward_launch", "forward"]

_MOST_ACCUMULATED = 16384
"""Longest row (padded) whose sum for the weight's gradient is kept in registers; above it, in memory (in L2)."""


@triton.jit
def rms_norm_forward_kernel(
    x,
    residual,
    weight,
    y,
    h,
    rstd,
    x_stride,
    residual_stride,
    rows,
    eps,
    weight_offset,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND_BEFORE_WEIGHT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    mask = (row < rows)[:, None] & inside[None, :]
    out = row[:, None] * COLUMNS + column[None, :]
    value = load_rows(x, row, x_stride, column, rows, COLUMNS)
    scale = tl.load(weight + column, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if residual is not None:
        added = load_rows(residual, row, residual_stride, column, rows, COLUMNS)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(h.dtype.element_ty)
        tl.store(h + out, value, mask=mask)
    exact = keep(value.to(tl.float32), column, COLUMNS, BLOCK)
    reciprocal = tl.rsqrt(tl.sum(exact * exact, axis=1) / COLUMNS + eps)
    tl.store(rstd + row, reciprocal, mask=row < rows)
    normalised = exact * reciprocal[:, None]
    if ROUND_BEFORE_WEIGHT:
        normalised = normalised.to(x.dtype.element_ty).to(tl.float32)
    tl.store(y + out, (normalised * (scale + weight_offset)[None, :]).to(y.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_backward_kernel(
    dy,
    h,
    weight,
    rstd,
    dh,
    dx,
    partials,
    dy_stride,
    h_stride,
    dh_stride,
    rows,
    weight_offset,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    # Prefetching would read the sum held in memory before the row before it is added.
    tl.static_assert(not IN_MEMORY or STAGES == 1)
    if OVERLAPPED:
        tl.extra.cuda.gdc_launch_dependents()
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    scale = tl.load(weight + column, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    scale += weight_offset
    share = partials + tl.program_id(0).to(tl.int64) * COLUMNS + column
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        grad = load_rows(dy, row, dy_stride, column, rows, COLUMNS)
        value = load_rows(h, row, h_stride, column, rows, COLUMNS)
        reciprocal = tl.load(rstd + row, mask=row < rows, other=0.0)
        if dh is not None:
            added = load_rows(dh, row, dh_stride, column, rows, COLUMNS)
        grad = keep(grad.to(tl.float32), column, COLUMNS, BLOCK)
        normalised = keep(value.to(tl.float32) * reciprocal[:, None], column, COLUMNS, BLOCK)
        scaled = grad * scale[None, :]
        aligned = tl.sum(scaled * normalised, axis=1) / COLUMNS
        result = (scaled - normalised * aligned[:, None]) * reciprocal[:, None]
        if dh is not None:
            result += added.to(tl.float32)
        mask = (row < rows)[:, None] & inside[None, :]
        tl.store(dx + row[:, None] * COLUMNS + column[None, :], result.to(dx.dtype.element_ty), mask=mask)
        if IN_MEMORY:
            held = tl.load(share, mask=inside, other=0.0)
            tl.store(share, held + tl.sum(grad * normalised, axis=0), mask=inside)
            tl.debug_barrier()
        else:
            total += grad * normalised
    if not IN_MEMORY:
        tl.store(share, tl.sum(total, axis=0), mask=inside)


def backward_launch(columns: int, bytes_per_column: int, shared: int) -> Launch:
    """Return the launch for rows of `columns` elements; arguments as `looping_launch`."""
    launch = looping_launch(columns, bytes_per_column, shared)
    return launch if next_power_of_2(columns) <= _MOST_ACCUMULATED else dataclasses.replace(launch, stages=1)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    *,
    round_before_weight: bool,
    dtype: torch.dtype,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `(y, h, rstd)`: `y` of `dtype`, `h` is `x` itself without a residual, `rstd` is float32 `[rows]`."""
    wide = as_rows(x)
    rows, columns = wide.shape
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    h = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows == 0:
        return y, h, rstd
    launch = launch or tile_launch(columns)
    added = None if residual is None else as_rows(residual)
    with on_device_of(x):
        rms_norm_forward_kernel[(triton.cdiv(rows, launch.rows),)](
            wide,
            added,
            weight.contiguous(),
            y,
            None if residual is None else h,
            rstd,
            wide.stride(0),
            0 if added is None else added.stride(0),
            rows,
            eps,
            weight_offset,
            COLUMNS=columns,
            ROWS=launch.rows,
            BLOCK=next_power_of_2(columns),
            ROUND_BEFORE_WEIGHT=round_before_weight,
            num_warps=launch.warps,
            enable_fp_fusion=True,
        )
    return y, h, rstd


def backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    dh: torch.Tensor | None,
    weight_offset: float,
    *,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(dx, dweight)`; `dh` is the gradient of `h` from elsewhere, and is added to `dx`."""
    grad, wide = as_rows(dy), as_rows(h)
    rows, columns = wide.shape
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if rows == 0:
        return dx, torch.zeros_like(weight)
    added = None if dh is None else as_rows(dh)
    per_column = sum(x.element_size() for x in (grad, wide, added) if x is not None)
    launch = launch or backward_launch(columns, per_column, shared_bytes(h.device))
    block = next_power_of_2(columns)
    programs = min(triton.cdiv(rows, launch.rows), launch.per_multiprocessor * multiprocessors(h.device))
    overlapped = can_overlap(h.device)
    in_memory = block > _MOST_ACCUMULATED and launch.stages == 1
    make = torch.zeros if in_memory else torch.empty
    partials = make(1, programs, columns, dtype=torch.float32, device=h.device)
    with on_device_of(h):
        rms_norm_backward_kernel[(programs,)](
            grad,
            wide,
            weight.contiguous(),
            rstd,
            added,
            dx,
            partials,
            grad.stride(0),
            wide.stride(0),
            0 if added is None else added.stride(0),
            rows,
            weight_offset,
            COLUMNS=columns,
            ROWS=launch.rows,
            BLOCK=block,
            IN_MEMORY=in_memory,
            STAGES=launch.stages,
            OVERLAPPED=overlapped,
            num_warps=launch.warps,
            enable_fp_fusion=True,
            **resident_options(launch, h.device),
        )
    return dx, column_sums(partials, weight.dtype, overlapped=overlapped)[0]


def _forward_case(kind: str, columns: int, *, residual: bool, label: str) -> CompileCase:
    launch = tile_launch(columns)
    pointers = dict.fromkeys(("x", "weight", "y"), f"*{kind}") | {"rstd": "*fp32"}
    pointers |= {"residual": f"*{kind}", "h": f"*{kind}"} if residual else {}
    scalars = dict.fromkeys(("x_stride", "residual_stride", "rows"), "i32")
    scalars |= {"eps": "fp32", "weight_offset": "fp32"}
    constants: dict[str, Any] = {
        "COLUMNS": columns,
        "ROWS": launch.rows,
        "BLOCK": next_power_of_2(columns),
        "ROUND_BEFORE_WEIGHT": residual,
    }
    constants |= {} if residual else {"residual": None, "h": None}
    return CompileCase(rms_norm_forward_kernel, pointers | scalars, constants, launch.warps, label=label)


def _backward_case(kind: str, columns: int, *, residual: bool, label: str) -> CompileCase:
    per_column = {"bf16": 2, "fp16": 2, "fp32": 4}[kind] * (3 if residual else 2)
    launch = backward_launch(columns, per_column, 227 << 10)
    pointers = dict.fromkeys(("dy", "h", "weight", "dx"), f"*{kind}") | {"rstd": "*fp32", "partials": "*fp32"}
    pointers |= {"dh": f"*{kind}"} if residual else {}
    scalars = dict.fromkeys(("dy_stride", "h_stride", "dh_stride", "rows"), "i32")
    scalars |= {"weight_offset": "fp32"}
    block = next_power_of_2(columns)
    constants: dict[str, Any] = {
        "COLUMNS": columns,
        "ROWS": launch.rows,
        "BLOCK": block,
        "IN_MEMORY": block > _MOST_ACCUMULATED,
        "STAGES": launch.stages,
        "OVERLAPPED": False,
    }
    constants |= {} if residual else {"dh": None}
    return CompileCase(rms_norm_backward_kernel, pointers | scalars, constants, launch.warps, label=label)


COMPILE_CASES = [
    _forward_case("bf16", 4096, residual=True, label="bf16-residual"),
    _forward_case("fp16", 768, residual=False, label="fp16-short"),
    _forward_case("fp32", 14336, residual=False, label="fp32-long"),
    _backward_case("bf16", 4096, residual=True, label="bf16-residual"),
    _backward_case("fp16", 768, residual=False, label="fp16-short"),
    _backward_case("fp32", 14336, residual=False, label="fp32-long"),
]
