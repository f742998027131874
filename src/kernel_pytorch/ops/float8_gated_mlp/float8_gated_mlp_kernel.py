# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, operator"
# ruff: noqa: ANN001, ANN202, C901, N803, PLR0917
"""Triton kernels of gated activations that write FP8.

Least traffic for `n` elements of the product, bfloat16 inputs, in bytes: forward 5 n (read gate and up, write one);
backward 11 n (read the gradient, gate and up; write two gradients twice and the transposed product). A scale that is
not known beforehand costs a pass more: 4 n and 6 n. Tiles and transposition are those of `float8_cast_kernel`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernel_pytorch._triton.launch import Launch, multiprocessors, next_power_of_2, on_device_of, resident_options
from kernel_pytorch._triton.targets import CompileCase
from kernel_pytorch.ops.float8_cast.float8_cast_kernel import (
    FP8_TARGETS,
    FP8_TARGETS_AMD,
    FP8_TARGETS_NVIDIA,
    Tile,
    byte_pair,
    known_scale,
    magnitude,
    note_amax,
    roll_state,
    saturated,
    speaks_ptx,
    tell_fresh,
)
from kernel_pytorch.ops.float8_cast.layout import HISTORY_AT, padded
from kernel_pytorch.ops.gated_mlp.gated_mlp_kernel import gelu_tanh_argument

__all__ = ["COMPILE_CASES", "backward", "forward"]

_FORWARD = Tile(8, 1024, 8)
_BACKWARD = Tile(64, 128, 8)
_PREPARE_BLOCK, _PREPARE_WARPS, _PROGRAMS_EACH = 4096, 8, 4


@triton.jit
def _share(x, ACTIVATION: tl.constexpr):
    """Return what `x` is multiplied by in the activation."""
    if ACTIVATION == "silu":
        share = tl.sigmoid(x)
    elif ACTIVATION == "gelu_tanh":
        share = tl.sigmoid(gelu_tanh_argument(x))
    else:
        share = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
    return share


@triton.jit
def _gradients(grad, x, u, ACTIVATION: tl.constexpr):
    """Return the gradients of gate and up, and the product."""
    share = _share(x, ACTIVATION)
    if ACTIVATION == "silu":
        slope = share * (1.0 + x * (1.0 - share))
    elif ACTIVATION == "gelu_tanh":
        slope = share + x * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    active = x * share
    return grad * u * slope, grad * active, active * u


@triton.jit
def _partial_amax(grad, gate_up, partials, n, columns, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    most = tl.zeros([BLOCK], tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, n, tl.num_programs(0).to(tl.int64) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        # A row of `gate_up` holds the gates, then the ups.
        gate = at + at // columns * columns
        x = tl.load(gate_up + gate, mask=at < n, other=0.0).to(tl.float32)
        u = tl.load(gate_up + gate + columns, mask=at < n, other=0.0).to(tl.float32)
        if grad is None:
            most = tl.maximum(most, magnitude(x * _share(x, ACTIVATION) * u))
        else:
            g = tl.load(grad + at, mask=at < n, other=0.0).to(tl.float32)
            by_gate, by_up, _ = _gradients(g, x, u, ACTIVATION)
            most = tl.maximum(most, tl.maximum(magnitude(by_gate), magnitude(by_up)))
    tl.store(partials + tl.program_id(0), tl.max(most, axis=0))


@triton.jit
def float8_gated_mlp_prepare_kernel(
    grad,
    gate_up,
    state,
    partials,
    told,
    n,
    columns,
    limit,
    ACTIVATION: tl.constexpr,
    ROLL: tl.constexpr,
    HISTORY: tl.constexpr,
    POWER_OF_2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the amax of the product, or with `grad` of the gradients, where no scale is known; else move the scale."""
    if state is None:
        _partial_amax(grad, gate_up, partials, n, columns, ACTIVATION, BLOCK)
    else:
        scale = tl.load(state + 2)
        tell_fresh(told, scale)
        if scale == 0.0:
            _partial_amax(grad, gate_up, partials, n, columns, ACTIVATION, BLOCK)
        elif ROLL and tl.program_id(0) == 0:
            roll_state(state, scale, limit, HISTORY, POWER_OF_2)


@triton.jit
def float8_gated_mlp_forward_kernel(
    gate_up,
    out,
    state,
    state_bits,
    partials,
    inverse_out,
    rows,
    columns,
    blocks,
    count,
    limit,
    FORMAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UPDATE: tl.constexpr,
    POWER_OF_2: tl.constexpr,
    PARTIALS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    kind: tl.constexpr = tl.float8e4nv if FORMAT == "e4m3" else tl.float8e5
    program = tl.program_id(0)
    scale, inverse, amax, fresh = known_scale(state, partials, count, limit, PARTIALS, POWER_OF_2)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    gate = gate_up + row[:, None] * (2 * columns) + column[None, :]
    x = tl.load(gate, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gate + columns, mask=mask, other=0.0).to(tl.float32)
    product = x * _share(x, ACTIVATION) * u
    small = saturated(product, scale, limit)
    tl.store(out + row[:, None] * columns + column[None, :], small.to(kind), mask=mask)
    if program == 0:
        tl.store(inverse_out, inverse)
    if UPDATE:
        note_amax(state, state_bits, tl.max(magnitude(product), axis=1), scale, amax, fresh)


@triton.jit
def float8_gated_mlp_backward_kernel(
    grad,
    gate_up,
    row_out,
    column_out,
    product_out,
    state,
    state_bits,
    partials,
    inverse_out,
    product_inverse,
    rows,
    columns,
    words,
    blocks,
    count,
    limit,
    product_limit,
    FORMAT: tl.constexpr,
    PRODUCT_FORMAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UPDATE: tl.constexpr,
    POWER_OF_2: tl.constexpr,
    PARTIALS: tl.constexpr,
    PTX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    kind: tl.constexpr = tl.float8e4nv if FORMAT == "e4m3" else tl.float8e5
    program = tl.program_id(0)
    scale, inverse, amax, fresh = known_scale(state, partials, count, limit, PARTIALS, POWER_OF_2)
    product_scale = 1.0 / tl.load(product_inverse)
    first = (program // blocks).to(tl.int64) * (ROWS // 4) + tl.arange(0, ROWS // 4)
    column = (program % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < columns)[None, :]
    most = tl.zeros([ROWS // 4], tl.int32)
    gate_word = tl.zeros([ROWS // 4, COLUMNS], tl.int32)
    up_word = tl.zeros([ROWS // 4, COLUMNS], tl.int32)
    product_word = tl.zeros([ROWS // 4, COLUMNS], tl.int32)
    for j in tl.static_range(4):
        row = first * 4 + j
        mask = (row < rows)[:, None] & inside
        g = tl.load(grad + row[:, None] * columns + column[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = row[:, None] * (2 * columns) + column[None, :]
        x = tl.load(gate_up + gate, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(gate_up + gate + columns, mask=mask, other=0.0).to(tl.float32)
        by_gate, by_up, product = _gradients(g, x, u, ACTIVATION)
        if UPDATE:
            most = tl.maximum(most, tl.max(tl.maximum(magnitude(by_gate), magnitude(by_up)), axis=1))
        small_gate = saturated(by_gate, scale, limit)
        small_up = saturated(by_up, scale, limit)
        small = saturated(product, product_scale, product_limit)
        if row_out is not None:
            tl.store(row_out + gate, small_gate.to(kind), mask=mask)
            tl.store(row_out + gate + columns, small_up.to(kind), mask=mask)
        if j % 2 == 0:
            even_gate, even_up, even = small_gate, small_up, small
        else:
            if column_out is not None:
                gate_word |= byte_pair(even_gate, small_gate, FORMAT, PTX) << (8 * (j - 1))
                up_word |= byte_pair(even_up, small_up, FORMAT, PTX) << (8 * (j - 1))
            if product_out is not None:
                product_word |= byte_pair(even, small, PRODUCT_FORMAT, PTX) << (8 * (j - 1))
    at = column[:, None] * words + first[None, :]
    turned = (column < columns)[:, None] & (first < words)[None, :]
    if column_out is not None:
        tl.store(column_out + at, tl.trans(gate_word), mask=turned)
        tl.store(column_out + at + columns.to(tl.int64) * words, tl.trans(up_word), mask=turned)
    if product_out is not None:
        tl.store(product_out + at, tl.trans(product_word), mask=turned)
    if program == 0:
        tl.store(inverse_out, inverse)
    if UPDATE:
        note_amax(state, state_bits, most, scale, amax, fresh)


def _form(dtype: torch.dtype) -> str:
    return "e4m3" if dtype is torch.float8_e4m3fn else "e5m2"


def _prepare(
    grad: torch.Tensor | None,
    gate_up: torch.Tensor,
    state: torch.Tensor | None,
    limit: float,
    activation: str,
    *,
    roll: bool,
    power_of_2: bool,
) -> torch.Tensor:
    n = gate_up.numel() // 2
    programs = min(triton.cdiv(n, _PREPARE_BLOCK), _PROGRAMS_EACH * multiprocessors(gate_up.device))
    partials = torch.empty(programs + 1, dtype=torch.int32, device=gate_up.device)
    float8_gated_mlp_prepare_kernel[(programs,)](
        grad,
        gate_up,
        state,
        partials,
        partials[programs:],
        n,
        gate_up.shape[1] // 2,
        limit,
        ACTIVATION=activation,
        ROLL=roll and state is not None,
        HISTORY=1 if state is None else len(state) - HISTORY_AT,
        POWER_OF_2=power_of_2,
        BLOCK=_PREPARE_BLOCK,
        num_warps=_PREPARE_WARPS,
    )
    return partials


def forward(
    gate_up: torch.Tensor,
    state: torch.Tensor | None,
    dtype: torch.dtype,
    activation: str,
    *,
    update: bool,
    roll: bool,
    power_of_2: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(row, inverse)`; see `op.float8_gated_mlp_op`."""
    gate_up = gate_up.contiguous()
    rows, columns = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, columns), dtype=dtype)
    inverse = torch.empty(1, dtype=torch.float32, device=gate_up.device)
    if not out.numel():
        return out, inverse.fill_(1.0)
    limit = torch.finfo(dtype).max
    blocks = triton.cdiv(columns, _FORWARD.columns)
    with on_device_of(gate_up):
        partials = _prepare(None, gate_up, state, limit, activation, roll=roll, power_of_2=power_of_2)
        float8_gated_mlp_forward_kernel[(triton.cdiv(rows, _FORWARD.rows) * blocks,)](
            gate_up,
            out,
            state,
            None if state is None else state.view(torch.int32),
            partials,
            inverse,
            rows,
            columns,
            blocks,
            len(partials) - 1,
            limit,
            FORMAT=_form(dtype),
            ACTIVATION=activation,
            UPDATE=update and state is not None,
            POWER_OF_2=power_of_2,
            PARTIALS=next_power_of_2(len(partials) - 1),
            ROWS=_FORWARD.rows,
            COLUMNS=_FORWARD.columns,
            num_warps=_FORWARD.warps,
        )
    return out, inverse


def backward(
    grad: torch.Tensor,
    gate_up: torch.Tensor,
    state: torch.Tensor | None,
    product_inverse: torch.Tensor,
    dtypes: tuple[torch.dtype, torch.dtype],
    activation: str,
    *,
    row: bool,
    transposed: bool,
    again: bool,
    power_of_2: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `(row, transposed, inverse, product transposed)`; see `op.float8_gated_mlp_backward_op`."""
    grad, gate_up = grad.contiguous(), gate_up.contiguous()
    rows, columns = grad.shape
    row_out = grad.new_empty((rows, 2 * columns) if row else (0,), dtype=dtypes[0])
    column_out = grad.new_empty((2 * columns, padded(rows)) if transposed else (0,), dtype=dtypes[0])
    product_out = grad.new_empty((columns, padded(rows)) if again else (0,), dtype=dtypes[1])
    inverse = torch.empty(1, dtype=torch.float32, device=grad.device)
    if not grad.numel():
        return row_out, column_out.zero_(), inverse.fill_(1.0), product_out.zero_()
    limit = torch.finfo(dtypes[0]).max
    blocks = triton.cdiv(columns, _BACKWARD.columns)
    with on_device_of(grad):
        partials = _prepare(grad, gate_up, state, limit, activation, roll=True, power_of_2=power_of_2)
        float8_gated_mlp_backward_kernel[(triton.cdiv(padded(rows), _BACKWARD.rows) * blocks,)](
            grad,
            gate_up,
            row_out if row else None,
            column_out.view(torch.int32) if transposed else None,
            product_out.view(torch.int32) if again else None,
            state,
            None if state is None else state.view(torch.int32),
            partials,
            inverse,
            product_inverse,
            rows,
            columns,
            padded(rows) // 4,
            blocks,
            len(partials) - 1,
            limit,
            torch.finfo(dtypes[1]).max,
            FORMAT=_form(dtypes[0]),
            PRODUCT_FORMAT=_form(dtypes[1]),
            ACTIVATION=activation,
            UPDATE=state is not None,
            POWER_OF_2=power_of_2,
            PARTIALS=next_power_of_2(len(partials) - 1),
            PTX=speaks_ptx(grad),
            ROWS=_BACKWARD.rows,
            COLUMNS=_BACKWARD.columns,
            num_warps=_BACKWARD.warps,
            # Two programs at once, so that one loads while the other computes and writes.
            **resident_options(Launch(_BACKWARD.rows, _BACKWARD.warps, per_multiprocessor=2), grad.device),
        )
    return row_out, column_out, inverse, product_out


def _case(kernel: object, label: str, *, backwards: bool, prepares: bool, state: bool, ptx: bool = True) -> CompileCase:
    signature = {"gate_up": "*bf16", "partials": "*i32", "columns": "i32", "limit": "fp32"}
    constants: dict[str, object] = {"ACTIVATION": "silu", "POWER_OF_2": True}
    optional = {"grad": (backwards, "*bf16"), "state": (state, "*fp32")}
    if prepares:
        signature |= {"n": "i32", "told": "*i32"}
        constants |= {"ROLL": state, "HISTORY": 16, "BLOCK": _PREPARE_BLOCK}
    else:
        signature |= {"inverse_out": "*fp32"} | dict.fromkeys(("rows", "blocks", "count"), "i32")
        optional["state_bits"] = (state, "*i32")
        tile = _BACKWARD if backwards else _FORWARD
        constants |= {"FORMAT": "e5m2" if backwards else "e4m3", "UPDATE": state, "PARTIALS": 1024}
        constants |= {"ROWS": tile.rows, "COLUMNS": tile.columns}
        if backwards:
            signature |= {"row_out": "*fp8e5", "column_out": "*i32", "product_out": "*i32", "words": "i32"}
            signature |= {"product_inverse": "*fp32", "product_limit": "fp32"}
            constants |= {"PRODUCT_FORMAT": "e4m3", "PTX": ptx}
        else:
            signature["out"] = "*fp8e4nv"
            optional.pop("grad")
    for name, (present, what) in optional.items():
        if present:
            signature[name] = what
        else:
            constants[name] = None
    targets: tuple[str, ...] | None = None if prepares else FP8_TARGETS
    if "PTX" in constants:
        targets = FP8_TARGETS_NVIDIA if ptx else FP8_TARGETS_AMD
    warps = _PREPARE_WARPS if prepares else _BACKWARD.warps if backwards else _FORWARD.warps
    return CompileCase(kernel, signature, constants, warps, label=label, targets=targets)


COMPILE_CASES = [
    _case(float8_gated_mlp_prepare_kernel, "forward", backwards=False, prepares=True, state=True),
    _case(float8_gated_mlp_prepare_kernel, "backward", backwards=True, prepares=True, state=False),
    _case(float8_gated_mlp_forward_kernel, "delayed", backwards=False, prepares=False, state=True),
    _case(float8_gated_mlp_backward_kernel, "delayed", backwards=True, prepares=False, state=True),
    _case(float8_gated_mlp_backward_kernel, "current", backwards=True, prepares=False, state=False),
    _case(float8_gated_mlp_backward_kernel, "amd", backwards=True, prepares=False, state=True, ptx=False),
]
