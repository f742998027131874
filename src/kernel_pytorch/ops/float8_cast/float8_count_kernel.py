# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, operator"
# ruff: noqa: ANN001, ANN202, N803, PLR0917
"""Triton kernel that counts what a cast to FP8 lost: one pass over what is counted, one launch.

Sums are kept by element and added up once a program, by atomics whose order does not matter: counts are whole numbers,
and a magnitude's bits are ordered as the magnitudes are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernel_pytorch._triton.launch import multiprocessors, on_device_of
from kernel_pytorch._triton.targets import CompileCase
from kernel_pytorch.ops.float8_cast.float8_cast_kernel import FP8_TARGETS, magnitude

__all__ = ["COMPILE_CASES", "count"]

_BLOCK, _WARPS = 2048, 8


@triton.jit
def float8_count_kernel(
    x,
    inverse,
    counters,
    counter_bits,
    n,
    columns,
    row_stride,
    inverse_stride,
    limit,
    half_least,
    SMALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add numbers of elements, and take the largest magnitude, of rows of `x`; `SMALL`: they are in FP8 already."""
    saturated = tl.zeros([BLOCK], tl.int32)
    flushed = tl.zeros([BLOCK], tl.int32)
    wrong = tl.zeros([BLOCK], tl.int32)
    most = tl.zeros([BLOCK], tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, n, tl.num_programs(0).to(tl.int64) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < n
        row = at // columns
        value = tl.load(x + row * row_stride + at % columns, mask=there, other=0.0).to(tl.float32)
        back = tl.load(inverse + row * inverse_stride, mask=there, other=1.0)
        if SMALL:
            size = tl.abs(value)
            amax = size * back
            high = size >= limit
            low = size == 0.0
        else:
            amax = tl.abs(value)
            size = tl.div_rn(amax, back)
            high = size > limit
            low = (size <= half_least) & (amax > 0.0)
        bits = magnitude(amax)
        finite = bits < 0x7F800000
        saturated += (high & finite & there).to(tl.int32)
        flushed += (low & finite & there).to(tl.int32)
        wrong += (~finite & there).to(tl.int32)
        most = tl.maximum(most, tl.where(finite & there, bits, 0))
    tl.atomic_add(counters, tl.cast(n, tl.float64), mask=tl.program_id(0) == 0, sem="relaxed")
    tl.atomic_add(counters + 1, tl.sum(saturated, axis=0).to(tl.float64), sem="relaxed")
    tl.atomic_add(counters + 2, tl.sum(flushed, axis=0).to(tl.float64), sem="relaxed")
    tl.atomic_add(counters + 3, tl.sum(wrong, axis=0).to(tl.float64), sem="relaxed")
    largest = tl.max(most, axis=0).to(tl.float32, bitcast=True).to(tl.float64)
    tl.atomic_max(counter_bits + 4, largest.to(tl.int64, bitcast=True), sem="relaxed")


def count(
    x: torch.Tensor,
    inverse: torch.Tensor,
    counters: torch.Tensor,
    *,
    apart: int,
    limit: float,
    least: float,
    small: bool,
) -> None:
    """Count every `apart`-th row.

    Args:
        x: `[rows, columns]`, contiguous.
        inverse: Fp32 `[1]`, or `[rows, 1]` contiguous.
        counters: Float64 `[5]` (`counting.Column`), written.
        apart: Rows from one that is counted to the next.
        limit: The format's largest number.
        least: Its smallest.
        small: Whether `x` is in FP8.
    """
    rows, columns = -(-len(x) // apart), x.shape[1]
    n = rows * columns
    if not n:
        return
    programs = min(triton.cdiv(n, _BLOCK), 2 * multiprocessors(x.device))
    with on_device_of(x):
        float8_count_kernel[(programs,)](
            x, inverse, counters, counters.view(torch.int64), n, columns, apart * columns,
            apart if inverse.dim() == 2 else 0, limit, least / 2, SMALL=small, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip


def _case(kind: str, label: str, *, small: bool) -> CompileCase:
    pointers = {"x": f"*{kind}", "inverse": "*fp32", "counters": "*fp64", "counter_bits": "*i64"}
    integers = dict.fromkeys(("n", "columns", "row_stride", "inverse_stride"), "i32")
    return CompileCase(
        float8_count_kernel, pointers | integers | {"limit": "fp32", "half_least": "fp32"},
        {"SMALL": small, "BLOCK": _BLOCK}, _WARPS, label=label, targets=FP8_TARGETS,
    )  # fmt: skip


COMPILE_CASES = [_case("bf16", "wide", small=False), _case("fp8e5", "small", small=True)]
