# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, operator"
# ruff: noqa: ANN001, ANN201, ANN202, N803, PLR0917
"""Triton kernels of the gated activations: elementwise over two inputs, so every byte is moved once.

Least traffic, in units of the bytes of `gate`: forward 3 (read gate and up, write the product), backward 5 (read the
gradient, gate and up; write two gradients). Nothing but the inputs is kept for backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernel_pytorch._triton.launch import as_rows, on_device_of
from kernel_pytorch._triton.targets import CompileCase

__all__ = ["COMPILE_CASES", "Tile", "backward", "forward", "gelu_tanh_argument"]


class Tile(NamedTuple):
    """Elements of a row that one program takes, and its warps."""

    block: int = 2048
    warps: int = 4


@triton.jit
def gelu_tanh_argument(x):
    """Return `2 sqrt(2 / pi) (x + 0.044715 x^3)`: GELU's tanh form is `x * sigmoid` of it."""
    return 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)


@triton.jit
def gated_mlp_forward_kernel(
    gate, up, out, gate_stride, up_stride, columns, blocks, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    x = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        share = tl.sigmoid(x)
    elif ACTIVATION == "gelu_tanh":
        share = tl.sigmoid(gelu_tanh_argument(x))
    else:
        share = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
    tl.store(out + row * columns + column, (x * share * u).to(out.dtype.element_ty), mask=mask)


@triton.jit
def gated_mlp_backward_kernel(
    grad,
    gate,
    up,
    gate_grad,
    up_grad,
    grad_stride,
    gate_stride,
    up_stride,
    columns,
    blocks,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    g = tl.load(grad + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        share = tl.sigmoid(x)
        slope = share * (1.0 + x * (1.0 - share))
    elif ACTIVATION == "gelu_tanh":
        share = tl.sigmoid(gelu_tanh_argument(x))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        slope = share + x * share * (1.0 - share) * inner
    else:
        share = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    out = row * columns + column
    tl.store(gate_grad + out, (g * u * slope).to(gate_grad.dtype.element_ty), mask=mask)
    tl.store(up_grad + out, (g * x * share).to(up_grad.dtype.element_ty), mask=mask)


def _matrices(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tensors as one long row each where all are contiguous (no masked tails), else as rows."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return tuple(tensor.reshape(1, -1) for tensor in tensors)
    return tuple(as_rows(tensor) for tensor in tensors)


def forward(gate: torch.Tensor, up: torch.Tensor, activation: str, *, tile: Tile | None = None) -> torch.Tensor:
    """Return `activation(gate) * up`, contiguous."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel() == 0:
        return out
    tile = tile or Tile()
    x, u = _matrices(gate, up)
    rows, columns = x.shape
    blocks = triton.cdiv(columns, tile.block)
    with on_device_of(gate):
        gated_mlp_forward_kernel[(rows * blocks,)](
            x,
            u,
            out,
            x.stride(0),
            u.stride(0),
            columns,
            blocks,
            ACTIVATION=activation,
            BLOCK=tile.block,
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )
    return out


def backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str, *, tile: Tile | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of `gate` and `up`, contiguous."""
    gate_grad, up_grad = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if gate.numel() == 0:
        return gate_grad, up_grad
    tile = tile or Tile()
    g, x, u = _matrices(grad, gate, up)
    rows, columns = x.shape
    blocks = triton.cdiv(columns, tile.block)
    with on_device_of(gate):
        gated_mlp_backward_kernel[(rows * blocks,)](
            g,
            x,
            u,
            gate_grad,
            up_grad,
            g.stride(0),
            x.stride(0),
            u.stride(0),
            columns,
            blocks,
            ACTIVATION=activation,
            BLOCK=tile.block,
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )
    return gate_grad, up_grad


def _case(kind: str, activation: str, *, backwards: bool) -> CompileCase:
    names = ("grad", "gate", "up", "gate_grad", "up_grad") if backwards else ("gate", "up", "out")
    strides = ("grad_stride", "gate_stride", "up_stride") if backwards else ("gate_stride", "up_stride")
    signature = dict.fromkeys(names, f"*{kind}") | dict.fromkeys((*strides, "columns", "blocks"), "i32")
    kernel = gated_mlp_backward_kernel if backwards else gated_mlp_forward_kernel
    constants = {"ACTIVATION": activation, "BLOCK": Tile().block}
    return CompileCase(kernel, signature, constants, Tile().warps, label=f"{kind}-{activation}")


COMPILE_CASES = [
    _case(kind, activation, backwards=backwards)
    for backwards in (False, True)
    for kind, activation in (("bf16", "silu"), ("fp16", "gelu_tanh"), ("fp32", "gelu"))
]
