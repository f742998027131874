# mypy: disable-error-code="no-untyped-call"
"""The gradient of attention's output in one memory layout, that of models, where cuDNN by PyTorch needs it.

PyTorch keeps the graph of cuDNN's backward under a key that holds the strides of queries, keys and values, not those
of the gradient (`MHAParams` in `aten/src/ATen/native/cudnn/MHA.cpp`, torch 2.11). A process that has run a shape with
the gradient as `[batch, heads, tokens, size]` in memory and then runs it as `[batch, tokens, heads, size]`, which is
what models do, gets gradients of queries, keys and values that have nothing to do with its inputs (relative error 1.4
on an H200). Nothing raises.

So every gradient that our calls of cuDNN get is brought into the models' layout. That of the output would not do: it
follows the queries', which a compiler lays out otherwise than eager code, and while tracing it is known by PyTorch's
description of the operator only.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

__all__ = ["cudnn_mistakes_layouts", "in_layout", "keep_layout", "with_gradient_in_layout"]

_SAME = 0.1
"""Relative difference of two gradients above which they are not of one function; measured: below 1e-6 or 1.4."""


def in_layout(gradient: Tensor) -> Tensor:
    """Return `[batch, heads, tokens, size]` that is `[batch, tokens, heads, size]` in memory, copied if it is not."""
    return gradient.transpose(1, 2).contiguous().transpose(1, 2)


def keep_layout(out: Tensor) -> Tensor:
    """Let the gradient of an output arrive in the models' layout, where cuDNN mistakes others; return the output.

    While `torch.compile` traces, always: nothing can be tried then, what has the layout already is not copied, and the
    same process may run the shape eagerly, too.
    """
    if not (out.requires_grad and out.is_cuda):
        return out
    if torch.compiler.is_compiling():
        return with_gradient_in_layout(out)
    if _needed(out.device):
        out.register_hook(in_layout)
    return out


class _InLayout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        del ctx
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        del ctx
        return in_layout(gradient)


def with_gradient_in_layout(out: Tensor) -> Tensor:
    """Return an output whose gradient has the models' layout, by operators that a compiler traces."""
    found: Tensor = _InLayout.apply(out)
    return found


def _needed(device: torch.device) -> bool:
    if torch.cuda.is_current_stream_capturing():
        return True  # nothing can be tried now
    return cudnn_mistakes_layouts(device)


@functools.cache
def cudnn_mistakes_layouts(device: torch.device) -> bool:
    """Return whether the second of two layouts of a gradient gives other gradients than the first, by trying it.

    Args:
        device: A GPU; True also where cuDNN's attention cannot be tried on it.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        forward = torch.ops.aten._scaled_dot_product_cudnn_attention.default  # noqa: SLF001
        out: Tensor = forward(q, k, v, None, compute_log_sumexp=True, scale=0.125)[0]
        return out

    with torch.random.fork_rng([device]), torch.enable_grad(), torch.autocast("cuda", enabled=False):
        shape = (1, 2, 128, 64)
        q, k, v = (torch.randn(shape, device=device, dtype=torch.float16, requires_grad=True) for _ in range(3))
        gradient = torch.randn(shape, device=device, dtype=torch.float16)
        turned = gradient.transpose(1, 2).contiguous().transpose(1, 2)
        found = []
        for given in (gradient, turned):
            try:
                out = attend(q, k, v)
                found.append(torch.autograd.grad(out, v, given)[0].double())
            except RuntimeError:
                return True
        return float((found[0] - found[1]).norm()) > _SAME * float(found[0].norm())
