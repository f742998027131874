# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, operator"
# ruff: noqa: ANN001, ANN202, N803, PLR0917, SIM108
"""Triton kernels that update all parameters of an optimizer in one launch, and one tiny launch before it.

Both read a table in device memory: a row of `FIELDS` int64 a tensor (addresses, number of elements, group), so that
the number of launches does not depend on the number of tensors. The first kernel counts the steps up and works out
what depends on them in fp64, once a tensor: `1 - beta2**t` in fp32 loses four digits at the first steps. The second
walks over chunks of the tensors.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernel_pytorch._triton.launch import on_device_of
from kernel_pytorch._triton.targets import CompileCase
from kernel_pytorch.ops.adamw.op import CHUNK

__all__ = ["COEFFICIENTS", "COMPILE_CASES", "FIELDS", "HYPER", "launch"]

FIELDS = 8
"""Words of a row of the table: parameter, gradient, exp_avg, exp_avg_sq, master copy, step, elements, group."""
HYPER = 8
"""Words of a row of hyper-parameters: lr, log2(beta1), log2(beta2), 1 - beta1, beta2, eps, weight decay, flags."""
COEFFICIENTS = 16
"""Words of a row of coefficients, of which nine are used: a row is one cache line."""

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def prepare_kernel(
    table_ptr,
    hyper_ptr,
    coefficients_ptr,
    n,
    FIELDS: tl.constexpr,
    HYPER: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add one to the step of each tensor and store its coefficients in fp32."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    row = table_ptr + i * FIELDS
    steps = tl.load(row + 5, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    group = tl.load(row + 7, mask=mask, other=0)
    step = tl.load(steps, mask=mask, other=0.0) + 1.0
    tl.store(steps, step, mask=mask)

    t = step.to(tl.float64)
    h = hyper_ptr + group * HYPER
    lr = tl.load(h + 0, mask=mask, other=0.0)
    log2_beta1 = tl.load(h + 1, mask=mask, other=-1.0)
    log2_beta2 = tl.load(h + 2, mask=mask, other=-1.0)
    one_minus_beta1 = tl.load(h + 3, mask=mask, other=0.0)
    beta2 = tl.load(h + 4, mask=mask, other=0.0)
    eps = tl.load(h + 5, mask=mask, other=0.0)
    weight_decay = tl.load(h + 6, mask=mask, other=0.0)
    flags = tl.load(h + 7, mask=mask, other=0.0)
    decoupled = (flags == 1.0) | (flags == 3.0)
    maximize = flags >= 2.0
    zero = weight_decay * 0.0

    c = coefficients_ptr + i * COEFFICIENTS
    tl.store(c + 0, tl.where(decoupled, lr * weight_decay, zero).to(tl.float32), mask=mask)
    tl.store(c + 1, tl.where(decoupled, zero, weight_decay).to(tl.float32), mask=mask)
    tl.store(c + 2, tl.where(maximize, zero - 1.0, zero + 1.0).to(tl.float32), mask=mask)
    tl.store(c + 3, one_minus_beta1.to(tl.float32), mask=mask)
    tl.store(c + 4, beta2.to(tl.float32), mask=mask)
    tl.store(c + 5, (1.0 - beta2).to(tl.float32), mask=mask)
    tl.store(c + 6, (lr / (1.0 - tl.exp2(t * log2_beta1))).to(tl.float32), mask=mask)
    tl.store(c + 7, (1.0 / tl.sqrt(1.0 - tl.exp2(t * log2_beta2))).to(tl.float32), mask=mask)
    tl.store(c + 8, eps.to(tl.float32), mask=mask)


@triton.jit
def _update(
    param_ptr,
    grad_ptr,
    first_ptr,
    second_ptr,
    master_ptr,
    mask,
    decay,
    l2,
    sign,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    step_size,
    rsqrt_correction,
    eps,
    MASTER: tl.constexpr,
):
    """Update the elements at these addresses; `mask=None` where all exist and accesses are 16 bytes wide."""
    grad = tl.load(grad_ptr, mask=mask).to(tl.float32)
    first = tl.load(first_ptr, mask=mask).to(tl.float32)
    second = tl.load(second_ptr, mask=mask).to(tl.float32)
    if MASTER:
        param = tl.load(master_ptr, mask=mask)
    else:
        param = tl.load(param_ptr, mask=mask).to(tl.float32)
    grad = grad * sign
    grad = tl.where(l2 != 0.0, grad + l2 * param, grad)
    # Not param * (1 - decay): in fp32 that rounds a decay of 1e-6 to within 5 % of itself, the same way at every step.
    param = param - decay * param
    first = first + one_minus_beta1 * (grad - first)
    second = beta2 * second + one_minus_beta2 * grad * grad
    param = param - step_size * (first / (tl.sqrt(second) * rsqrt_correction + eps))
    tl.store(first_ptr, first.to(first_ptr.dtype.element_ty), mask=mask)
    tl.store(second_ptr, second.to(second_ptr.dtype.element_ty), mask=mask)
    tl.store(param_ptr, param.to(param_ptr.dtype.element_ty), mask=mask)
    if MASTER:
        tl.store(master_ptr, param, mask=mask)


@triton.jit
def update_kernel(
    table_ptr,
    coefficients_ptr,
    tensor_of_ptr,
    number_ptr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    MASTER: tl.constexpr,
    FIELDS: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Update a chunk, the `number[c]`-th of its tensor, where `c` is the program."""
    c = tl.program_id(0)
    tensor = tl.load(tensor_of_ptr + c).to(tl.int64)
    start = tl.load(number_ptr + c).to(tl.int64) * CHUNK
    row = table_ptr + tensor * FIELDS
    at_param = tl.load(row + 0)
    at_grad = tl.load(row + 1)
    at_first = tl.load(row + 2)
    at_second = tl.load(row + 3)
    at_master = tl.load(row + 4)
    size = tl.load(row + 6)
    k = coefficients_ptr + tensor * COEFFICIENTS
    decay = tl.load(k + 0)
    l2 = tl.load(k + 1)
    sign = tl.load(k + 2)
    one_minus_beta1 = tl.load(k + 3)
    beta2 = tl.load(k + 4)
    one_minus_beta2 = tl.load(k + 5)
    step_size = tl.load(k + 6)
    rsqrt_correction = tl.load(k + 7)
    eps = tl.load(k + 8)
    aligned = ((at_param | at_grad | at_first | at_second | at_master) & 15) == 0
    lane = tl.arange(0, BLOCK)
    single = tl.arange(0, TAIL)
    end = tl.minimum(start + CHUNK, size)
    wide_end = tl.where(aligned, start + (end - start) // BLOCK * BLOCK, start)
    for at in tl.range(start, wide_end, BLOCK, num_stages=1):
        _update(
            tl.multiple_of(at_param.to(tl.pointer_type(PARAM)), 16) + at + lane,
            tl.multiple_of(at_grad.to(tl.pointer_type(GRAD)), 16) + at + lane,
            tl.multiple_of(at_first.to(tl.pointer_type(FIRST)), 16) + at + lane,
            tl.multiple_of(at_second.to(tl.pointer_type(SECOND)), 16) + at + lane,
            tl.multiple_of(at_master.to(tl.pointer_type(tl.float32)), 16) + at + lane,
            None,
            decay,
            l2,
            sign,
            one_minus_beta1,
            beta2,
            one_minus_beta2,
            step_size,
            rsqrt_correction,
            eps,
            MASTER,
        )
    # One element a thread: with eight, their addresses take 176 registers, and one program fills a multiprocessor.
    for at in range(wide_end, end, TAIL):
        _update(
            at_param.to(tl.pointer_type(PARAM)) + at + single,
            at_grad.to(tl.pointer_type(GRAD)) + at + single,
            at_first.to(tl.pointer_type(FIRST)) + at + single,
            at_second.to(tl.pointer_type(SECOND)) + at + single,
            at_master.to(tl.pointer_type(tl.float32)) + at + single,
            at + single < end,
            decay,
            l2,
            sign,
            one_minus_beta1,
            beta2,
            one_minus_beta2,
            step_size,
            rsqrt_correction,
            eps,
            MASTER,
        )


def launch(
    table: torch.Tensor,
    hyper: torch.Tensor,
    coefficients: torch.Tensor,
    tensor_of: torch.Tensor,
    number: torch.Tensor,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype],
    *,
    master: bool,
    chunk: int,
    block: int,
    num_warps: int,
) -> None:
    """Launch both kernels.

    Args:
        table: `[tensors, FIELDS]` int64.
        hyper: `[groups, HYPER]` fp64.
        coefficients: `[tensors, COEFFICIENTS]` fp32, overwritten.
        tensor_of: `[chunks]` int32: which tensor each chunk is of.
        number: `[chunks]` int32: which chunk of its tensor it is.
        dtypes: Of parameter, gradient, exp_avg and exp_avg_sq.
        master: Whether the table has addresses of fp32 master copies, which are then what is updated.
        chunk: Elements of a chunk; a multiple of `block`.
        block: Elements that a program updates at once; a power of two.
        num_warps: Warps a program.
    """
    tensors, chunks = table.shape[0], tensor_of.numel()
    types: list[Any] = [_DTYPES[dtype] for dtype in dtypes]
    with on_device_of(table):
        prepare_kernel[(triton.cdiv(tensors, 64),)](
            table, hyper, coefficients, tensors, FIELDS, HYPER, COEFFICIENTS, 64, num_warps=2
        )
        if not chunks:
            return
        update_kernel[(chunks,)](
            table, coefficients, tensor_of, number, *types, master, FIELDS, COEFFICIENTS, chunk, block,
            min(block, 32 * num_warps), num_warps=num_warps,
        )  # fmt: skip


def _update_case(label: str, dtypes: tuple[Any, Any, Any, Any], *, master: bool = False) -> CompileCase:
    names = ("PARAM", "GRAD", "FIRST", "SECOND")
    sizes = {"FIELDS": FIELDS, "COEFFICIENTS": COEFFICIENTS, "CHUNK": CHUNK, "BLOCK": 2048, "TAIL": 256}
    return CompileCase(
        update_kernel,
        {
            "table_ptr": "*i64",
            "coefficients_ptr": "*fp32",
            "tensor_of_ptr": "*i32",
            "number_ptr": "*i32",
        },
        {**dict(zip(names, dtypes, strict=True)), "MASTER": master, **sizes},
        num_warps=8,
        label=label,
    )


COMPILE_CASES: list[CompileCase] = [
    CompileCase(
        prepare_kernel,
        {"table_ptr": "*i64", "hyper_ptr": "*fp64", "coefficients_ptr": "*fp32", "n": "i32"},
        {"FIELDS": FIELDS, "HYPER": HYPER, "COEFFICIENTS": COEFFICIENTS, "BLOCK": 64},
        num_warps=2,
    ),
    _update_case("bf16", (tl.bfloat16,) * 4),
    _update_case("fp32", (tl.float32,) * 4),
    _update_case("master", (tl.bfloat16, tl.bfloat16, tl.float32, tl.float32), master=True),
]
