# mypy: disable-error-code="untyped-decorator, no-untyped-call"
# ruff: noqa: FBT001
"""The linear layer and the product it is made of, as operators of PyTorch: schema, shapes without data, gradient."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["linear_op", "product_op"]

torch.library.define(
    "kernel_pytorch::product", "(Tensor a, Tensor b, Tensor? bias, bool transpose_a, bool transpose_b) -> Tensor"
)
torch.library.define("kernel_pytorch::linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl("kernel_pytorch::product", "cuda")
def _product(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, transpose_a: bool, transpose_b: bool
) -> torch.Tensor:
    from kernel_pytorch.ops.linear.choice import multiply

    return multiply(a, b, bias, transpose_a=transpose_a, transpose_b=transpose_b)


@torch.library.impl("kernel_pytorch::product", "cpu")
def _product_on_cpu(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, transpose_a: bool, transpose_b: bool
) -> torch.Tensor:
    from kernel_pytorch.ops.linear.reference import product_reference

    return product_reference(a, b, bias, transpose_a=transpose_a, transpose_b=transpose_b)


@torch.library.register_fake("kernel_pytorch::product")
def _product_fake(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, transpose_a: bool, transpose_b: bool
) -> torch.Tensor:
    del bias
    return a.new_empty((a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1]))


product_op = torch.ops.kernel_pytorch.product


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y: torch.Tensor = product_op(x, weight, bias, False, True)  # noqa: FBT003
    return y


for _kind in ("cuda", "cpu"):
    torch.library.impl("kernel_pytorch::linear", _kind)(_linear)


@torch.library.register_fake("kernel_pytorch::linear")
def _linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    del bias
    return x.new_empty((x.shape[0], weight.shape[0]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[:2])


def _gradient(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad
    return (
        product_op(dy, weight, None, False, False) if wants_x else None,  # noqa: FBT003
        product_op(dy, x, None, True, False) if wants_weight else None,  # noqa: FBT003
        dy.sum(0) if wants_bias else None,
    )


torch.library.register_autograd("kernel_pytorch::linear", _gradient, setup_context=_keep)

linear_op = torch.ops.kernel_pytorch.linear
