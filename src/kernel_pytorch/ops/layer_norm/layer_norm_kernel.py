# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, operator"
# ruff: noqa: ANN001, ANN202, N803, PLR0917
"""Triton kernels of LayerNorm: a row lies in the registers of one program, so memory is touched once.

Least traffic, in units of the bytes of `x`: forward 2 (read x, write y), with residual 4; backward 3 (read h and dy,
write dx), with residual 4. The variance is that of the centred row, for the difference of two sums cancels. Gradients
of weight and bias are summed as in `rms_norm_kernel`: a fixed number of programs, each over its own rows in order.
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

_MOST_ACCUMULATED = 8192
"""Longest row (padded) whose sums for the gradients are kept in registers; above it, in memory (in L2)."""


@triton.jit
def layer_norm_forward_kernel(
    x,
    residual,
    weight,
    bias,
    y,
    h,
    mean,
    rstd,
    x_stride,
    residual_stride,
    rows,
    eps,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    mask = (row < rows)[:, None] & inside[None, :]
    out = row[:, None] * COLUMNS + column[None, :]
    value = load_rows(x, row, x_stride, column, rows, COLUMNS)
    if residual is not None:
        added = load_rows(residual, row, residual_stride, column, rows, COLUMNS)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(h.dtype.element_ty)
        tl.store(h + out, value, mask=mask)
    exact = keep(value.to(tl.float32), column, COLUMNS, BLOCK)
    average = tl.sum(exact, axis=1) / COLUMNS
    centred = keep(exact - average[:, None], column, COLUMNS, BLOCK)
    reciprocal = tl.rsqrt(tl.sum(centred * centred, axis=1) / COLUMNS + eps)
    tl.store(mean + row, average, mask=row < rows)
    tl.store(rstd + row, reciprocal, mask=row < rows)
    # Not before the sums: held meanwhile, it takes the registers of one program in four.
    scale = tl.load(weight + column, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    result = centred * reciprocal[:, None] * scale[None, :]
    if bias is not None:
        shift = tl.load(bias + column, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        result += shift[None, :]
    tl.store(y + out, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm_backward_kernel(
    dy,
    h,
    weight,
    mean,
    rstd,
    dh,
    dx,
    weight_partials,
    bias_partials,
    dy_stride,
    h_stride,
    dh_stride,
    rows,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    # Prefetching would read the sums held in memory before the row before it is added.
    tl.static_assert(not IN_MEMORY or STAGES == 1)
    if OVERLAPPED:
        tl.extra.cuda.gdc_launch_dependents()
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    scale = tl.load(weight + column, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    share = tl.program_id(0).to(tl.int64) * COLUMNS + column
    weight_total = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        grad = load_rows(dy, row, dy_stride, column, rows, COLUMNS)
        value = load_rows(h, row, h_stride, column, rows, COLUMNS)
        average = tl.load(mean + row, mask=row < rows, other=0.0)
        reciprocal = tl.load(rstd + row, mask=row < rows, other=0.0)
        if dh is not None:
            added = load_rows(dh, row, dh_stride, column, rows, COLUMNS)
        grad = keep(grad.to(tl.float32), column, COLUMNS, BLOCK)
        normalised = (value.to(tl.float32) - average[:, None]) * reciprocal[:, None]
        normalised = keep(normalised, column, COLUMNS, BLOCK)
        scaled = grad * scale[None, :]
        # Both sums in one exchange between the warps.
        shifted, aligned = tl.split(tl.sum(tl.join(scaled, scaled * normalised), axis=1) / COLUMNS)
        common = normalised * (aligned * reciprocal)[:, None] + (shifted * reciprocal)[:, None]
        result = scaled * reciprocal[:, None] - common
        if dh is not None:
            result += added.to(tl.float32)
        mask = (row < rows)[:, None] & inside[None, :]
        tl.store(dx + row[:, None] * COLUMNS + column[None, :], result.to(dx.dtype.element_ty), mask=mask)
        if IN_MEMORY:
            held = tl.load(weight_partials + share, mask=inside, other=0.0)
            tl.store(weight_partials + share, held + tl.sum(grad * normalised, axis=0), mask=inside)
            if bias_partials is not None:
                held = tl.load(bias_partials + share, mask=inside, other=0.0)
                tl.store(bias_partials + share, held + tl.sum(grad, axis=0), mask=inside)
            tl.debug_barrier()
        else:
            weight_total += grad * normalised
            if bias_partials is not None:
                bias_total += grad
    if not IN_MEMORY:
        tl.store(weight_partials + share, tl.sum(weight_total, axis=0), mask=inside)
        if bias_partials is not None:
            tl.store(bias_partials + share, tl.sum(bias_total, axis=0), mask=inside)


def backward_launch(columns: int, bytes_per_column: int, shared: int) -> Launch:
    """Return the launch for rows of `columns` elements; arguments as `looping_launch`."""
    launch = looping_launch(columns, bytes_per_column, shared)
    return launch if next_power_of_2(columns) <= _MOST_ACCUMULATED else dataclasses.replace(launch, stages=1)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    *,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `(y, h, mean, rstd)`: `h` is `x` itself without a residual; `mean` and `rstd` are float32 `[rows]`."""
    wide = as_rows(x)
    rows, columns = wide.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    if rows == 0:
        return y, h, mean, rstd
    launch = launch or tile_launch(columns)
    added = None if residual is None else as_rows(residual)
    with on_device_of(x):
        layer_norm_forward_kernel[(triton.cdiv(rows, launch.rows),)](
            wide,
            added,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            None if residual is None else h,
            mean,
            rstd,
            wide.stride(0),
            0 if added is None else added.stride(0),
            rows,
            eps,
            COLUMNS=columns,
            ROWS=launch.rows,
            BLOCK=next_power_of_2(columns),
            num_warps=launch.warps,
            enable_fp_fusion=True,
        )
    return y, h, mean, rstd


def backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dh: torch.Tensor | None,
    *,
    with_bias: bool,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `(dx, dweight, dbias)`; `dh` is added to `dx`; `dbias` is empty unless `with_bias`."""
    grad, wide = as_rows(dy), as_rows(h)
    rows, columns = wide.shape
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if rows == 0:
        zeros = torch.zeros(columns, dtype=weight.dtype, device=h.device)
        return dx, zeros, zeros.new_zeros(columns if with_bias else 0)
    added = None if dh is None else as_rows(dh)
    per_column = sum(x.element_size() for x in (grad, wide, added) if x is not None)
    launch = launch or backward_launch(columns, per_column, shared_bytes(h.device))
    block = next_power_of_2(columns)
    programs = min(triton.cdiv(rows, launch.rows), launch.per_multiprocessor * multiprocessors(h.device))
    overlapped = can_overlap(h.device)
    in_memory = block > _MOST_ACCUMULATED and launch.stages == 1
    make = torch.zeros if in_memory else torch.empty
    partials = make(1 + with_bias, programs, columns, dtype=torch.float32, device=h.device)
    with on_device_of(h):
        layer_norm_backward_kernel[(programs,)](
            grad,
            wide,
            weight.contiguous(),
            mean,
            rstd,
            added,
            dx,
            partials[0],
            partials[1] if with_bias else None,
            grad.stride(0),
            wide.stride(0),
            0 if added is None else added.stride(0),
            rows,
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
    dweight, *dbias = column_sums(partials, weight.dtype, overlapped=overlapped)
    return dx, dweight, dbias[0] if dbias else weight.new_empty(0)


def _forward_case(kind: str, columns: int, *, residual: bool, label: str) -> CompileCase:
    launch = tile_launch(columns)
    pointers = dict.fromkeys(("x", "weight", "bias", "y"), f"*{kind}") | {"mean": "*fp32", "rstd": "*fp32"}
    pointers |= dict.fromkeys(("residual", "h"), f"*{kind}") if residual else {}
    scalars = dict.fromkeys(("x_stride", "residual_stride", "rows"), "i32") | {"eps": "fp32"}
    constants: dict[str, Any] = {
        "COLUMNS": columns,
        "ROWS": launch.rows,
        "BLOCK": next_power_of_2(columns),
    }
    constants |= {} if residual else {"residual": None, "h": None}
    return CompileCase(layer_norm_forward_kernel, pointers | scalars, constants, launch.warps, label=label)


def _backward_case(kind: str, columns: int, *, residual: bool, label: str) -> CompileCase:
    per_column = {"bf16": 2, "fp16": 2, "fp32": 4}[kind] * (3 if residual else 2)
    launch = backward_launch(columns, per_column, 227 << 10)
    pointers = dict.fromkeys(("dy", "h", "weight", "dx"), f"*{kind}")
    pointers |= dict.fromkeys(("mean", "rstd", "weight_partials", "bias_partials"), "*fp32")
    pointers |= {"dh": f"*{kind}"} if residual else {}
    scalars = dict.fromkeys(("dy_stride", "h_stride", "dh_stride", "rows"), "i32")
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
    return CompileCase(layer_norm_backward_kernel, pointers | scalars, constants, launch.warps, label=label)


COMPILE_CASES = [
    _forward_case("bf16", 4096, residual=True, label="bf16-residual"),
    _forward_case("fp16", 768, residual=False, label="fp16-short"),
    _forward_case("fp32", 14336, residual=False, label="fp32-long"),
    _backward_case("bf16", 4096, residual=True, label="bf16-residual"),
    _backward_case("fp16", 768, residual=False, label="fp16-short"),
    _backward_case("bf16", 8192, residual=False, label="bf16-wide"),
    _backward_case("fp32", 14336, residual=False, label="fp32-long"),
]
