# mypy: disable-error-code="untyped-decorator"
"""The gated activations as operators of PyTorch: schemas, shapes without data, gradients."""

from __future__ import annotations

from typing import Any

import torch

from kernel_pytorch._triton.launch import INTERPRETED

__all__ = ["gated_mlp_op"]

_KINDS = "cpu" if INTERPRETED else "cuda"

torch.library.define("kernel_pytorch::gated_mlp", "(Tensor gate, Tensor up, str activation) -> Tensor")
torch.library.define(
    "kernel_pytorch::gated_mlp_backward",
    "(Tensor grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
)


@torch.library.impl("kernel_pytorch::gated_mlp", _KINDS)
def _gated_mlp(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    from kernel_pytorch.ops.gated_mlp import gated_mlp_kernel as kernel

    return kernel.forward(gate, up, activation)


@torch.library.impl("kernel_pytorch::gated_mlp_backward", _KINDS)
def _gated_mlp_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    from kernel_pytorch.ops.gated_mlp import gated_mlp_kernel as kernel

    return kernel.backward(grad, gate, up, activation)


@torch.library.register_fake("kernel_pytorch::gated_mlp")
def _gated_mlp_fake(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    del up, activation
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@torch.library.register_fake("kernel_pytorch::gated_mlp_backward")
def _gated_mlp_backward_fake(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    del grad
    return _gated_mlp_fake(gate, up, activation), _gated_mlp_fake(gate, up, activation)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gate_grad, up_grad = torch.ops.kernel_pytorch.gated_mlp_backward(grad, *ctx.saved_tensors, ctx.activation)
    return gate_grad, up_grad, None


torch.library.register_autograd("kernel_pytorch::gated_mlp", _gradient, setup_context=_keep)

gated_mlp_op = torch.ops.kernel_pytorch.gated_mlp
