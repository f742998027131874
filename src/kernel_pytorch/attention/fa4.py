# ruff: noqa: PLR0917
"""FlashAttention-4: the CuTe DSL kernels of the package `flash-attn-4` (imports as `flash_attn.cute`).

Forward and backward for Ampere to Blackwell, compiled for a shape class at its first call, which takes seconds.
https://github.com/Dao-AILab/flash-attention/tree/main/flash_attn/cute
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from kernel_pytorch.attention import flash_op
from kernel_pytorch.attention.applies import first, gpu_capability, plain_heads
from kernel_pytorch.attention.flash_op import Problem
from kernel_pytorch.attention.types import BROKEN, AttentionShape, Implementation
from kernel_pytorch.core.types import Skip

__all__ = ["IMPLEMENTATION", "PACKAGES", "fits", "missing"]

PACKAGES = ("flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels", "apache-tvm-ffi")


_SMALL, _BACKWARD_HEADS = 64, 32


@functools.cache
def missing() -> Skip | None:
    """Return why the package cannot be imported; `None` where it can."""
    try:
        found = importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:
        found = False
    if not found:
        return Skip("the package flash-attn-4 is not installed", "pip install 'flash-attn-4[cu13]'")
    try:
        _interface()
    except Exception as error:  # noqa: BLE001 - a foreign package and its compiler: whatever it raises is the reason
        return Skip(
            f"flash_attn.cute {BROKEN}: {type(error).__name__}: {error}",
            "pip check; or let torch import it: with attention.activated('FA4')",
        )
    return None


def _interface() -> Any:
    return importlib.import_module("flash_attn.cute.interface")


def fits(shape: AttentionShape, device: torch.device, *, backward: bool) -> Skip | None:
    """FP16 and BF16, head sizes in multiples of 8, no mask, no dropout; lower-right diagonals."""
    return first(
        gpu_capability("FlashAttention-4", device, (8, 0)),
        plain_heads("FlashAttention-4", shape, largest=256, lower_right=True),
        lambda: _odd_backward(shape, backward=backward),
        missing,
    )


def _odd_backward(shape: AttentionShape, *, backward: bool) -> Skip | None:
    if not backward or shape.head_dim <= _SMALL or shape.head_dim % _BACKWARD_HEADS == 0:
        return None
    return Skip(
        f"FlashAttention-4's backward is wrong at head sizes above {_SMALL} that {_BACKWARD_HEADS} does not divide, "
        f"got {shape.head_dim} (4.0.0b36 on sm_90: relative error 0.9 at 72, 1.2 at 80)"
    )


def _options(problem: Problem) -> dict[str, Any]:
    packed = problem.cu_q is not None
    return {
        "softmax_scale": problem.scale,
        "causal": problem.causal,
        "softcap": problem.softcap,
        "window_size_left": None if problem.left < 0 else problem.left,
        "window_size_right": None if problem.right < 0 or problem.causal else problem.right,
        "cu_seqlens_q": problem.cu_q,
        "cu_seqlens_k": problem.cu_k,
        "max_seqlen_q": problem.max_q if packed else None,
        "max_seqlen_k": problem.max_k if packed else None,
    }


def _forward(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    # The public function returns the log-sum-exp only where a gradient is wanted, and hides the backward in autograd.
    out, lse, *_ = _interface()._flash_attn_fwd(q, k, v, return_lse=True, **_options(problem))  # noqa: SLF001
    return out, lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _interface()._flash_attn_bwd(q, k, v, out, grad, lse, **_options(problem))[:3]  # noqa: SLF001
    return dq, dk, dv


flash_op.FORWARD["fa4"] = _forward
flash_op.BACKWARD["fa4"] = _backward


_dense, _packed = flash_op.calls("fa4", "fa4")

IMPLEMENTATION = Implementation(
    name="fa4",
    summary="FlashAttention-4 (CuTe DSL), forward and backward",
    fits=fits,
    call=_dense,
    call_varlen=_packed,
    packages=PACKAGES,
)
