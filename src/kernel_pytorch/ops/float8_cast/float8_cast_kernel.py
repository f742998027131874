# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, operator"
# ruff: noqa: ANN001, ANN201, ANN202, C901, N803, PLR0917
"""Triton kernels that cast to FP8 with one scale: rows, the transposed copy and the next amax in one pass.

Least traffic for a bfloat16 input of `n` elements, in bytes: 4 n with both copies (read 2, write 1 and 1), 3 n with
one; a scale that is not known beforehand costs another read of 2 n. Factors for rows and columns, as a normalisation
has them, are multiplied in on the way.

Four rows at a time become the bytes of a 32-bit word, so that the transposition moves words through shared memory:
a word of the tile is a word of the transposed copy. On NVIDIA the bytes of a word are made by an instruction of their
own (`byte_pair`): ptxas 12.8 and 12.9 lose halves of registers that a store of FP8 and a word share, and take the stack
pointer's bytes instead (https://github.com/triton-lang/triton/issues/11111).

The largest magnitude is an integer maximum over the bits of absolute values: NaN and infinity are above all numbers
there, and the order of the atomics does not matter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernel_pytorch._triton.launch import INTERPRETED, multiprocessors, next_power_of_2, on_device_of
from kernel_pytorch._triton.targets import CompileCase
from kernel_pytorch.ops.float8_cast.layout import HISTORY_AT, padded, whole_shape

__all__ = [
    "COMPILE_CASES",
    "FP8_TARGETS",
    "FP8_TARGETS_AMD",
    "FP8_TARGETS_NVIDIA",
    "Tile",
    "byte_pair",
    "cast",
    "known_scale",
    "magnitude",
    "note_amax",
    "roll_state",
    "saturated",
    "scale_for",
    "speaks_ptx",
    "tell_fresh",
]

FP8_TARGETS_NVIDIA = ("sm_89", "sm_90", "sm_100", "sm_103", "sm_120")
FP8_TARGETS_AMD = ("gfx942", "gfx950")
FP8_TARGETS = FP8_TARGETS_NVIDIA + FP8_TARGETS_AMD
_PREPARE_BLOCK, _PREPARE_WARPS, _PROGRAMS_EACH = 8192, 8, 4


class Tile(NamedTuple):
    """Rows and columns that one program casts, and its warps."""

    rows: int = 128
    columns: int = 128
    warps: int = 8


@triton.jit
def scale_for(amax, limit, POWER_OF_2: tl.constexpr):
    """Return the factor that brings `amax` to `limit`, at most 2^126, and 1 for an amax of zero."""
    # Rounded as the definition divides: a scale that is off by its last bit sends some values to the next number.
    scale = tl.minimum(tl.div_rn(limit, tl.where(amax > 0, amax, limit)), 8.507059173023462e37)
    if POWER_OF_2:
        scale = (scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def magnitude(value):
    """Return the bits of the absolute value of float32: ordered as the values are, NaN last."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def saturated(value, scale, limit):
    """Return `value * scale` in float32 as FP8 can hold it; NaN for what is not finite."""
    scaled = tl.minimum(tl.maximum(value * scale, -limit), limit)
    return tl.where(magnitude(value) < 0x7F800000, scaled, float("nan"))


@triton.jit
def byte_pair(low, high, FORMAT: tl.constexpr, PTX: tl.constexpr):
    """Return two float32 values in FP8 as the two low bytes of an integer of 32 bits, the others zero.

    `PTX`: by one instruction whose result is a whole register, which no store of FP8 shares; see the module.
    """
    if PTX:
        if FORMAT == "e4m3":
            pair = tl.inline_asm_elementwise(
                "{ .reg .b16 pair; cvt.rn.satfinite.e4m3x2.f32 pair, $2, $1; cvt.u32.u16 $0, pair; }",
                "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        else:
            pair = tl.inline_asm_elementwise(
                "{ .reg .b16 pair; cvt.rn.satfinite.e5m2x2.f32 pair, $2, $1; cvt.u32.u16 $0, pair; }",
                "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
    else:
        kind: tl.constexpr = tl.float8e4nv if FORMAT == "e4m3" else tl.float8e5
        pair = low.to(kind).to(tl.uint8, bitcast=True).to(tl.int32)
        pair |= high.to(kind).to(tl.uint8, bitcast=True).to(tl.int32) << 8
    return pair


def speaks_ptx(x: torch.Tensor) -> bool:
    """Return whether kernels on a tensor are compiled for NVIDIA."""
    return x.is_cuda and not INTERPRETED and torch.version.hip is None


@triton.jit
def _scale_of_partials(partials, count, limit, PARTIALS: tl.constexpr, POWER_OF_2: tl.constexpr):
    at = tl.arange(0, PARTIALS)
    amax = tl.max(tl.load(partials + at, mask=at < count, other=0), axis=0).to(tl.float32, bitcast=True)
    scale = scale_for(amax, limit, POWER_OF_2)
    inverse = 1.0 / tl.where(scale > 0, scale, 1.0)
    return scale, tl.where(magnitude(amax) < 0x7F800000, inverse, float("nan")), amax


@triton.jit
def known_scale(state, partials, count, limit, PARTIALS: tl.constexpr, POWER_OF_2: tl.constexpr):
    """Return (scale, inverse, amax, whether it is new): the state's scale, or that of the partial maxima.

    Which of both is told behind the partial maxima (`prepare`), not by the state: the first program to end writes a new
    scale there, and threads of one program that read before and after would part at the next barrier. (What an H200
    showed fits: now and then words of a transposed copy that came from shared memory too early.)
    """
    if state is None:
        scale, inverse, amax = _scale_of_partials(partials, count, limit, PARTIALS, POWER_OF_2)
        fresh = True
    else:
        fresh = tl.load(partials + count) != 0
        scale, inverse, amax = 1.0, 1.0, 0.0
        if fresh:
            scale, inverse, amax = _scale_of_partials(partials, count, limit, PARTIALS, POWER_OF_2)
        else:
            scale = tl.load(state + 2)
            inverse = 1.0 / scale
    return scale, inverse, amax, fresh


@triton.jit
def tell_fresh(told, scale):
    """Write where the kernel that casts looks whether a scale is yet to be known: once, by the first program."""
    tl.store(told, (scale == 0.0).to(tl.int32), mask=tl.program_id(0) == 0)


@triton.jit
def roll_state(state, scale, limit, HISTORY: tl.constexpr, POWER_OF_2: tl.constexpr):
    """Take the amax of the last casts into the history, and set the scale by it."""
    slot = tl.arange(0, HISTORY)
    place = tl.load(state).to(tl.int32)
    last = tl.load(state + 1)
    seen = tl.load(state + 3 + slot)
    valid = (last > 0.0) & (last < float("inf"))
    seen = tl.where(slot == tl.where(valid, place, -1), last, seen)
    tl.store(state + 3 + slot, seen)
    tl.store(state, tl.where(valid, (place + 1) % HISTORY, place).to(tl.float32))
    tl.store(state + 1, 0.0)
    most = tl.max(seen, axis=0)
    tl.store(state + 2, tl.where(most > 0.0, scale_for(most, limit, POWER_OF_2), scale))


@triton.jit
def note_amax(state, state_bits, most, scale, amax, fresh):
    """Note the largest magnitude of rows; where the scale is new and known to be one, the scale too.

    No program of this kernel reads a scale that is new (`known_scale`).
    """
    usable = (amax > 0.0) & (amax < float("inf"))
    tl.store(state + 2, scale, mask=fresh & usable & (tl.program_id(0) == 0))
    tl.atomic_max(state_bits + 1, tl.where(fresh & ~usable, 0, tl.max(most, axis=0)), sem="relaxed")


@triton.jit
def _partial_amax(x, row_factor, column_factor, partials, n, columns, BLOCK: tl.constexpr):
    most = tl.zeros([BLOCK], tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, n, tl.num_programs(0).to(tl.int64) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
        if row_factor is not None:
            value *= tl.load(row_factor + at // columns, mask=at < n, other=0.0)
            value *= tl.load(column_factor + at % columns, mask=at < n, other=0.0).to(tl.float32)
        most = tl.maximum(most, magnitude(value))
    tl.store(partials + tl.program_id(0), tl.max(most, axis=0))


@triton.jit
def float8_prepare_kernel(
    x,
    row_factor,
    column_factor,
    state,
    partials,
    told,
    n,
    columns,
    limit,
    ROLL: tl.constexpr,
    HISTORY: tl.constexpr,
    POWER_OF_2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the amax of `x` where no scale is known; else take the amax of the last cast into the history."""
    program = tl.program_id(0)
    if state is None:
        _partial_amax(x, row_factor, column_factor, partials, n, columns, BLOCK)
    else:
        scale = tl.load(state + 2)
        tell_fresh(told, scale)
        if scale == 0.0:
            _partial_amax(x, row_factor, column_factor, partials, n, columns, BLOCK)
        elif ROLL and program == 0:
            roll_state(state, scale, limit, HISTORY, POWER_OF_2)


@triton.jit
def float8_cast_kernel(
    x,
    row_factor,
    column_factor,
    row_out,
    column_out,
    state,
    state_bits,
    partials,
    inverse_out,
    rows,
    columns,
    row_stride,
    column_stride,
    words,
    blocks,
    count,
    limit,
    FORMAT: tl.constexpr,
    UPDATE: tl.constexpr,
    POWER_OF_2: tl.constexpr,
    PARTIALS: tl.constexpr,
    PTX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Cast a tile; `column_out` is the transposed copy as words of four rows, of which a row has `words` here."""
    kind: tl.constexpr = tl.float8e4nv if FORMAT == "e4m3" else tl.float8e5
    program = tl.program_id(0)
    scale, inverse, amax, fresh = known_scale(state, partials, count, limit, PARTIALS, POWER_OF_2)
    first = (program // blocks).to(tl.int64) * (ROWS // 4) + tl.arange(0, ROWS // 4)
    column = (program % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < columns)[None, :]
    most = tl.zeros([ROWS // 4], tl.int32)
    word = tl.zeros([ROWS // 4, COLUMNS], tl.int32)
    if column_factor is not None:
        weight = tl.load(column_factor + column, mask=column < columns, other=0.0).to(tl.float32)
    for j in tl.static_range(4):
        row = first * 4 + j
        mask = (row < rows)[:, None] & inside
        value = tl.load(x + row[:, None] * columns + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if row_factor is not None:
            value = value * tl.load(row_factor + row, mask=row < rows, other=0.0)[:, None] * weight[None, :]
        if UPDATE:
            most = tl.maximum(most, tl.max(magnitude(value), axis=1))
        small = saturated(value, scale, limit)
        if row_out is not None:
            tl.store(row_out + row[:, None] * row_stride + column[None, :], small.to(kind), mask=mask)
        if column_out is not None:
            if j % 2 == 0:
                even = small
            else:
                word |= byte_pair(even, small, FORMAT, PTX) << (8 * (j - 1))
    if column_out is not None:
        at = column[:, None] * column_stride + first[None, :]
        tl.store(column_out + at, tl.trans(word), mask=(column < columns)[:, None] & (first < words)[None, :])
    if program == 0:
        tl.store(inverse_out, inverse)
    if UPDATE:
        note_amax(state, state_bits, most, scale, amax, fresh)


def cast(
    xs: list[torch.Tensor],
    state: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    row: bool,
    transposed: bool,
    update: bool,
    roll: bool,
    power_of_2: bool = False,
    axis: int = 0,
    row_factor: torch.Tensor | None = None,
    column_factor: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `(row, transposed, inverse)`; see `op.float8_cast_op`."""
    rows, columns = whole_shape(xs, axis)
    xs = [x.contiguous() for x in xs]
    if row_factor is not None and column_factor is not None:
        row_factor, column_factor = row_factor.contiguous(), column_factor.contiguous()
    row_out = xs[0].new_empty((rows, columns) if row else (0,), dtype=dtype)
    column_out = xs[0].new_empty((columns, padded(rows)) if transposed else (0,), dtype=dtype)
    inverse = torch.empty(1, dtype=torch.float32, device=xs[0].device)
    if not rows or not columns:
        return row_out, column_out.zero_(), inverse.fill_(1.0)
    tile = tile or Tile()
    limit = torch.finfo(dtype).max
    most = _PROGRAMS_EACH * multiprocessors(xs[0].device)
    programs = [min(triton.cdiv(x.numel(), _PREPARE_BLOCK), most) for x in xs]
    count = sum(programs)
    partials = torch.empty(count + 1, dtype=torch.int32, device=xs[0].device)
    with on_device_of(xs[0]):
        for i, x in enumerate(xs):
            float8_prepare_kernel[(programs[i],)](
                x,
                row_factor,
                column_factor,
                state,
                partials[sum(programs[:i]) :],
                partials[count:],
                x.numel(),
                x.shape[1],
                limit,
                ROLL=roll and state is not None and i == 0,
                HISTORY=1 if state is None else len(state) - HISTORY_AT,
                POWER_OF_2=power_of_2,
                BLOCK=_PREPARE_BLOCK,
                num_warps=_PREPARE_WARPS,
            )
        words = column_out.view(torch.int32) if transposed else column_out
        start = 0
        for i, x in enumerate(xs):
            blocks = triton.cdiv(x.shape[1], tile.columns)
            # Stacked pieces but the last end where the next begins: whole words, as 16 divides their rows.
            last = i == len(xs) - 1 or axis == 1
            below = padded(rows - (start if axis == 0 else 0)) if last else len(x)
            float8_cast_kernel[(triton.cdiv(below, tile.rows) * blocks,)](
                x,
                row_factor,
                column_factor,
                row_out.narrow(axis, start, x.shape[axis]) if row else None,
                (words[start:] if axis == 1 else words[:, start // 4 :]) if transposed else None,
                state,
                None if state is None else state.view(torch.int32),
                partials,
                inverse,
                len(x),
                x.shape[1],
                columns,
                padded(rows) // 4,
                below // 4,
                blocks,
                count,
                limit,
                FORMAT="e4m3" if dtype is torch.float8_e4m3fn else "e5m2",
                UPDATE=update and state is not None,
                POWER_OF_2=power_of_2,
                PARTIALS=next_power_of_2(count),
                PTX=speaks_ptx(x),
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                num_warps=tile.warps,
            )
            start += x.shape[axis]
    return row_out, column_out, inverse


def _factors(kind: str, *, scaled: bool) -> tuple[tuple[str, bool, str], ...]:
    return ("row_factor", scaled, "*fp32"), ("column_factor", scaled, f"*{kind}")


def _prepare_case(kind: str, label: str, *, state: bool, scaled: bool = False) -> CompileCase:
    signature = {"x": f"*{kind}", "partials": "*i32", "told": "*i32", "n": "i32", "columns": "i32", "limit": "fp32"}
    constants: dict[str, object] = {"ROLL": state, "HISTORY": 16, "POWER_OF_2": False, "BLOCK": _PREPARE_BLOCK}
    for name, present, what in (("state", state, "*fp32"), *_factors(kind, scaled=scaled)):
        if present:
            signature[name] = what
        else:
            constants[name] = None
    return CompileCase(float8_prepare_kernel, signature, constants, _PREPARE_WARPS, label=label)


def _cast_case(
    kind: str, form: str, label: str, *, state: bool, row: bool = True, partials: int = 1024, ptx: bool = True,
    scaled: bool = False,
) -> CompileCase:  # fmt: skip
    small = "*fp8e4nv" if form == "e4m3" else "*fp8e5"
    signature = {"x": f"*{kind}", "column_out": "*i32", "partials": "*i32", "inverse_out": "*fp32"}
    constants: dict[str, object] = {
        "FORMAT": form, "UPDATE": state, "POWER_OF_2": not state, "PARTIALS": partials, "PTX": ptx,
        "ROWS": Tile().rows, "COLUMNS": Tile().columns,
    }  # fmt: skip
    states = (("state", state, "*fp32"), ("state_bits", state, "*i32"))
    for name, present, what in (("row_out", row, small), *states, *_factors(kind, scaled=scaled)):
        if present:
            signature[name] = what
        else:
            constants[name] = None
    integers = dict.fromkeys(("rows", "columns", "row_stride", "column_stride", "words", "blocks", "count"), "i32")
    return CompileCase(
        float8_cast_kernel, signature | integers | {"limit": "fp32"}, constants, Tile().warps,
        label=label, targets=FP8_TARGETS_NVIDIA if ptx else FP8_TARGETS_AMD,
    )  # fmt: skip


COMPILE_CASES = [
    _prepare_case("bf16", "delayed", state=True),
    _prepare_case("fp32", "current", state=False),
    _cast_case("bf16", "e4m3", "delayed", state=True),
    _cast_case("fp32", "e5m2", "current", state=False),
    _cast_case("bf16", "e5m2", "transposed", state=True, row=False),
    _cast_case("bf16", "e5m2", "small", state=False, partials=512),
    _cast_case("bf16", "e4m3", "amd", state=True, ptx=False),
    _prepare_case("bf16", "scaled", state=True, scaled=True),
    _cast_case("bf16", "e4m3", "scaled", state=True, scaled=True),
]
