# mypy: disable-error-code="untyped-decorator"
# ruff: noqa: FBT001, PLR0917
"""RMSNorm as operators of PyTorch: schemas, shapes without data, gradients; the kernels run where Triton runs."""

from __future__ import annotations

from typing import Any

import torch

from kernel_pytorch._triton.launch import INTERPRETED

__all__ = ["add_rms_norm_op", "rms_norm_op"]

_KINDS = "cpu" if INTERPRETED else "cuda"
_OPTIONS = "float eps, float weight_offset, bool round_before_weight"

torch.library.define("kernel_pytorch::rms_norm", f"(Tensor x, Tensor weight, {_OPTIONS}) -> (Tensor, Tensor)")
torch.library.define(
    "kernel_pytorch::add_rms_norm",
    f"(Tensor x, Tensor residual, Tensor weight, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "kernel_pytorch::rms_norm_backward",
    "(Tensor dy, Tensor h, Tensor weight, Tensor rstd, Tensor? dh, float weight_offset) -> (Tensor, Tensor)",
)


def _out_dtype(x: torch.Tensor, weight: torch.Tensor, round_before_weight: bool) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if round_before_weight else x.dtype


@torch.library.impl("kernel_pytorch::rms_norm", _KINDS)
def _rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    round_before_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    from kernel_pytorch.ops.rms_norm import rms_norm_kernel as kernel

    dtype = _out_dtype(x, weight, round_before_weight)
    y, _, rstd = kernel.forward(
        x, weight, None, eps, weight_offset, round_before_weight=round_before_weight, dtype=dtype
    )
    return y, rstd


@torch.library.impl("kernel_pytorch::add_rms_norm", _KINDS)
def _add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    round_before_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from kernel_pytorch.ops.rms_norm import rms_norm_kernel as kernel

    dtype = _out_dtype(x, weight, round_before_weight)
    return kernel.forward(x, weight, residual, eps, weight_offset, round_before_weight=round_before_weight, dtype=dtype)


@torch.library.impl("kernel_pytorch::rms_norm_backward", _KINDS)
def _rms_norm_backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    dh: torch.Tensor | None,
    weight_offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    from kernel_pytorch.ops.rms_norm import rms_norm_kernel as kernel

    return kernel.backward(dy, h, weight, rstd, dh, weight_offset)


def _fake_outputs(
    x: torch.Tensor,
    weight: torch.Tensor,
    round_before_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.empty(x.shape, dtype=_out_dtype(x, weight, round_before_weight), device=x.device)
    return y, torch.empty(x.shape[:-1].numel(), dtype=torch.float32, device=x.device)


@torch.library.register_fake("kernel_pytorch::rms_norm")
def _rms_norm_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    round_before_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    del eps, weight_offset
    return _fake_outputs(x, weight, round_before_weight)


@torch.library.register_fake("kernel_pytorch::add_rms_norm")
def _add_rms_norm_fake(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    round_before_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    del residual, eps, weight_offset
    y, rstd = _fake_outputs(x, weight, round_before_weight)
    return y, torch.empty(x.shape, dtype=x.dtype, device=x.device), rstd


@torch.library.register_fake("kernel_pytorch::rms_norm_backward")
def _rms_norm_backward_fake(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    dh: torch.Tensor | None,
    weight_offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    del dy, rstd, dh, weight_offset
    return torch.empty(h.shape, dtype=h.dtype, device=h.device), torch.empty_like(
        weight, memory_format=torch.contiguous_format
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, _, ctx.weight_offset, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _keep_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, _, weight, _, ctx.weight_offset, _ = inputs
    ctx.save_for_backward(output[1], weight, output[2])


def _gradient(ctx: Any, dy: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    h, weight, rstd = ctx.saved_tensors
    dx, dweight = torch.ops.kernel_pytorch.rms_norm_backward(dy, h, weight, rstd, None, ctx.weight_offset)
    return dx, dweight, None, None, None


def _gradient_of_sum(ctx: Any, dy: torch.Tensor, dh: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    h, weight, rstd = ctx.saved_tensors
    dx, dweight = torch.ops.kernel_pytorch.rms_norm_backward(dy, h, weight, rstd, dh, ctx.weight_offset)
    return dx, dx, dweight, None, None, None


torch.library.register_autograd("kernel_pytorch::rms_norm", _gradient, setup_context=_keep)
torch.library.register_autograd("kernel_pytorch::add_rms_norm", _gradient_of_sum, setup_context=_keep_sum)

rms_norm_op = torch.ops.kernel_pytorch.rms_norm
add_rms_norm_op = torch.ops.kernel_pytorch.add_rms_norm
