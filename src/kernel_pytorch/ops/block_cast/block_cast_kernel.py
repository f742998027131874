# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, operator"
# ruff: noqa: ANN001, ANN202, N803, PLR0917
"""Triton kernels that cast to formats whose scales belong to blocks, by rows or by squares.

Least traffic for a bfloat16 input of `n` elements, in bytes: 3 n to FP8 (read 2, write 1), 2.5 n to FP4, and the
scales. A program casts whole blocks, so that it knows their scales when it writes. Compiled for their targets and right
under the interpreter; not run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernel_pytorch._triton.launch import on_device_of
from kernel_pytorch._triton.targets import CompileCase
from kernel_pytorch.ops.block_cast.formats import BlockFormat, BlockMatrix

__all__ = ["COMPILE_CASES", "cast"]

_ELEMENTS, _WARPS = 4096, 4


@triton.jit
def _power_above(x):
    """Return the exponent of the least power of two that is at least a positive float32; at least -127."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127 + tl.where((bits & 0x7FFFFF) != 0, 1, 0)
    return tl.minimum(exponent, 127)


@triton.jit
def _e2m1(x):
    """Return codes of four bits, rounded to nearest, ties to even."""
    size = tl.abs(x)
    code = tl.where(size > 0.25, 1, 0) + tl.where(size >= 0.75, 1, 0) + tl.where(size > 1.25, 1, 0)
    code += tl.where(size >= 1.75, 1, 0) + tl.where(size > 2.5, 1, 0) + tl.where(size >= 3.5, 1, 0)
    code += tl.where(size > 5.0, 1, 0)
    return code | tl.where(x.to(tl.int32, bitcast=True) < 0, 8, 0)


@triton.jit
def block_cast_kernel(
    x,
    out,
    scales,
    whole,
    blocks,
    columns,
    across,
    limit,
    SCALE: tl.constexpr,
    FOUR_BITS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Cast `BLOCKS` blocks of `HEIGHT` rows and `WIDTH` columns; `across` of them lie side by side."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = tl.arange(0, HEIGHT * WIDTH)
    row = (block // across * HEIGHT)[:, None] + (element // WIDTH)[None, :]
    column = (block % across * WIDTH)[:, None] + (element % WIDTH)[None, :]
    inside = block < blocks
    mask = tl.broadcast_to(inside[:, None], (BLOCKS, HEIGHT * WIDTH))
    value = tl.load(x + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(value), axis=1)
    if SCALE == "e8m0":
        exponent = tl.where(amax > 0, _power_above(tl.div_rn(amax, limit)), -127)
        # 2^-127 is subnormal, and nothing but zeros is scaled by it.
        wide = (tl.maximum(exponent + 127, 1) << 23).to(tl.float32, bitcast=True)
        tl.store(scales + block, (exponent + 127).to(tl.uint8), mask=inside)
    elif SCALE == "e4m3":
        all_of_it = tl.load(whole)
        small = tl.div_rn(amax, limit * all_of_it).to(tl.float8e4nv)
        tl.store(scales + block, small, mask=inside)
        wide = small.to(tl.float32) * all_of_it
    else:
        wide = tl.where(amax > 0, tl.div_rn(amax, limit), 1.0)
        tl.store(scales + block, wide, mask=inside)
    safe = tl.where(wide > 0, wide, 1.0)
    scaled = tl.where((wide > 0)[:, None], tl.div_rn(value, tl.broadcast_to(safe[:, None], value.shape)), 0.0)
    scaled = tl.minimum(tl.maximum(scaled, -limit), limit)
    if FOUR_BITS:
        codes = tl.reshape(_e2m1(scaled), (BLOCKS, HEIGHT * WIDTH // 2, 2))
        low, high = tl.split(codes)
        half = tl.arange(0, HEIGHT * WIDTH // 2)
        at = (block // across)[:, None] * (columns // 2) + (block % across * (WIDTH // 2))[:, None] + half[None, :]
        inner = tl.broadcast_to(inside[:, None], (BLOCKS, HEIGHT * WIDTH // 2))
        tl.store(out + at, (low | (high << 4)).to(tl.uint8), mask=inner)
    else:
        tl.store(out + row * columns + column, scaled.to(tl.float8e4nv), mask=mask)


def cast(x: torch.Tensor, kind: BlockFormat) -> BlockMatrix:
    """Return a matrix in a block format; see `api.block_cast`."""
    x = x.contiguous()
    rows, columns = x.shape
    four_bits = kind.element == "e2m1"
    shape = (rows // kind.rows, columns // kind.columns)
    whole = torch.ones(1, device=x.device)
    if kind.scale == "e4m3":
        most = x.abs().amax().float().reshape(1)
        whole = torch.where(most > 0, most / (kind.limit * torch.finfo(torch.float8_e4m3fn).max), 1.0)
    out = x.new_empty((rows, columns // 2) if four_bits else x.shape, dtype=torch.uint8)
    out = out if four_bits else out.view(torch.float8_e4m3fn)
    stored = {"e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn, "float32": torch.float32}[kind.scale]
    scales = x.new_empty(shape, dtype=stored)
    each = max(1, _ELEMENTS // (kind.rows * kind.columns))
    with on_device_of(x):
        block_cast_kernel[(triton.cdiv(scales.numel(), each),)](
            x,
            out,
            scales,
            whole,
            scales.numel(),
            columns,
            shape[1],
            kind.limit,
            SCALE=kind.scale,
            FOUR_BITS=four_bits,
            HEIGHT=kind.rows,
            WIDTH=kind.columns,
            BLOCKS=each,
            num_warps=_WARPS if kind.rows == 1 else 2 * _WARPS,
        )
    return BlockMatrix(out, scales.view(torch.float8_e8m0fnu) if kind.scale == "e8m0" else scales, whole)


def _case(
    label: str, out: str, scales: str, scale: str, size: tuple[int, int], targets: tuple[str, ...]
) -> CompileCase:
    return CompileCase(
        block_cast_kernel,
        {"x": "*bf16", "out": out, "scales": scales, "whole": "*fp32", "blocks": "i32", "columns": "i32",
         "across": "i32", "limit": "fp32"},
        {"SCALE": scale, "FOUR_BITS": scale == "e4m3", "HEIGHT": size[0], "WIDTH": size[1],
         "BLOCKS": max(1, _ELEMENTS // (size[0] * size[1]))},
        _WARPS if size[0] == 1 else 2 * _WARPS,
        label=label,
        targets=targets,
    )  # fmt: skip


_BLACKWELL = ("sm_100", "sm_103", "sm_120")
COMPILE_CASES = [
    _case("mxfp8", "*fp8e4nv", "*u8", "e8m0", (1, 32), _BLACKWELL),
    _case("fp8_1x128", "*fp8e4nv", "*fp32", "float32", (1, 128), ("sm_90", *_BLACKWELL)),
    _case("fp8_128x128", "*fp8e4nv", "*fp32", "float32", (128, 128), ("sm_90", "sm_89", *_BLACKWELL)),
    _case("nvfp4", "*u8", "*fp8e4nv", "e4m3", (1, 16), (*_BLACKWELL,)[::-1]),
]
