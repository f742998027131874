# mypy: disable-error-code="untyped-decorator"
# ruff: noqa: FBT001, PLR0917
"""Rotary position embedding as an operator of PyTorch: schema, shapes without data, gradient."""

from __future__ import annotations

from typing import Any

import torch

from kernel_pytorch._triton.launch import INTERPRETED

__all__ = ["rope_op"]

_KINDS = "cpu" if INTERPRETED else "cuda"

torch.library.define(
    "kernel_pytorch::rope",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, str layout, bool interleaved, bool inverse) -> (Tensor, Tensor)",
)


@torch.library.impl("kernel_pytorch::rope", _KINDS)
def _rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    interleaved: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    from kernel_pytorch.ops.rope import rope_kernel as kernel

    return kernel.rotate(q, k, cos, sin, layout=layout, interleaved=interleaved, inverse=inverse)


@torch.library.register_fake("kernel_pytorch::rope")
def _rope_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    interleaved: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    del cos, sin, layout, interleaved, inverse
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    return torch.empty_like(q), torch.empty_like(k)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    del output
    _, _, cos, sin, *ctx.options = inputs
    ctx.save_for_backward(cos, sin)


def _gradient(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    layout, interleaved, inverse = ctx.options
    turned = torch.ops.kernel_pytorch.rope(dq, dk, *ctx.saved_tensors, layout, interleaved, not inverse)
    return (*turned, None, None, None, None, None)


torch.library.register_autograd("kernel_pytorch::rope", _gradient, setup_context=_keep)

rope_op = torch.ops.kernel_pytorch.rope
