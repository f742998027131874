# mypy: disable-error-code="untyped-decorator"
# ruff: noqa: PLR0917
"""LayerNorm as operators of PyTorch: schemas, shapes without data, gradients; the kernels run where Triton runs."""

from __future__ import annotations

from typing import Any

import torch

from kernel_pytorch._triton.launch import INTERPRETED

__all__ = ["add_layer_norm_op", "layer_norm_op"]

_KINDS = "cpu" if INTERPRETED else "cuda"

torch.library.define(
    "kernel_pytorch::layer_norm",
    "(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "kernel_pytorch::add_layer_norm",
    "(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "kernel_pytorch::layer_norm_backward",
    "(Tensor dy, Tensor h, Tensor weight, Tensor mean, Tensor rstd, Tensor? dh, bool with_bias)"
    " -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("kernel_pytorch::layer_norm", _KINDS)
def _layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from kernel_pytorch.ops.layer_norm import layer_norm_kernel as kernel

    y, _, mean, rstd = kernel.forward(x, weight, bias, None, eps)
    return y, mean, rstd


@torch.library.impl("kernel_pytorch::add_layer_norm", _KINDS)
def _add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from kernel_pytorch.ops.layer_norm import layer_norm_kernel as kernel

    return kernel.forward(x, weight, bias, residual, eps)


@torch.library.impl("kernel_pytorch::layer_norm_backward", _KINDS)
def _layer_norm_backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dh: torch.Tensor | None,
    with_bias: bool,  # noqa: FBT001
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from kernel_pytorch.ops.layer_norm import layer_norm_kernel as kernel

    return kernel.backward(dy, h, weight, mean, rstd, dh, with_bias=with_bias)


def _empty(x: torch.Tensor, *shape: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)


@torch.library.register_fake("kernel_pytorch::layer_norm")
def _layer_norm_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    del weight, bias, eps
    rows = x.shape[:-1].numel()
    return _empty(x, *x.shape), _empty(x, rows, dtype=torch.float32), _empty(x, rows, dtype=torch.float32)


@torch.library.register_fake("kernel_pytorch::add_layer_norm")
def _add_layer_norm_fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    del residual
    y, mean, rstd = _layer_norm_fake(x, weight, bias, eps)
    return y, _empty(x, *x.shape), mean, rstd


@torch.library.register_fake("kernel_pytorch::layer_norm_backward")
def _layer_norm_backward_fake(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dh: torch.Tensor | None,
    with_bias: bool,  # noqa: FBT001
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    del dy, mean, rstd, dh
    n = weight.shape[0]
    return _empty(h, *h.shape), _empty(weight, n), _empty(weight, n if with_bias else 0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, bias, _ = inputs
    ctx.with_bias = bias is not None
    ctx.save_for_backward(x, weight, *output[1:])


def _keep_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, _, weight, bias, _ = inputs
    ctx.with_bias = bias is not None
    ctx.save_for_backward(output[1], weight, *output[2:])


def _gradients(
    ctx: Any, dy: torch.Tensor, dh: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    dx, dweight, dbias = torch.ops.kernel_pytorch.layer_norm_backward(dy, *ctx.saved_tensors[:4], dh, ctx.with_bias)
    return dx, dweight, dbias if ctx.with_bias else None


def _gradient(ctx: Any, dy: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    return (*_gradients(ctx, dy, None), None)


def _gradient_of_sum(ctx: Any, dy: torch.Tensor, dh: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    dx, dweight, dbias = _gradients(ctx, dy, dh)
    return dx, dx, dweight, dbias, None


torch.library.register_autograd("kernel_pytorch::layer_norm", _gradient, setup_context=_keep)
torch.library.register_autograd("kernel_pytorch::add_layer_norm", _gradient_of_sum, setup_context=_keep_sum)

layer_norm_op = torch.ops.kernel_pytorch.layer_norm
add_layer_norm_op = torch.ops.kernel_pytorch.add_layer_norm
