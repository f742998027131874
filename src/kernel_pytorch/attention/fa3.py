# mypy: disable-error-code="no-untyped-call"
# ruff: noqa: PLR0917
"""FlashAttention-3: the Hopper kernels of `flash_attn_interface` (Shah et al., arXiv:2407.08608).

Some builds have no backward (`mha_bwd ... does not support backward`), which only running it tells. Their forward then
goes with the backward of FlashAttention-4 or cuDNN: `fa3+fa4`, `fa3+cudnn`. The FP8 forward is for inference.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from kernel_pytorch.attention import cudnn, fa4, flash_op
from kernel_pytorch.attention.applies import first, gpu_capability, plain_heads
from kernel_pytorch.attention.flash_op import Problem
from kernel_pytorch.attention.types import BROKEN, AttentionShape, Implementation
from kernel_pytorch.core.types import Numerics, Skip

__all__ = ["IMPLEMENTATIONS", "PACKAGES", "fits", "missing"]

PACKAGES = ("flash-attn-3", "tokenspeed-fa3")
"""Distributions that bring `flash_attn_interface`."""

_SHORT = 128
"""Queries up to which the keys may be split over multiprocessors: without that few blocks would run."""


_FP8_HEADS = 16
"""Elements of FP8 in 16 bytes, which is what a row must be a multiple of."""


@functools.cache
def missing() -> Skip | None:
    """Return why the package cannot be imported; `None` where it can."""
    fix = "build it from github.com/Dao-AILab/flash-attention (hopper/), or pip install tokenspeed-fa3 (no backward)"
    if importlib.util.find_spec("flash_attn_interface") is None:
        return Skip("no package brings flash_attn_interface (FlashAttention-3)", fix)
    try:
        importlib.import_module("flash_attn_interface")
    except Exception as error:  # noqa: BLE001 - a foreign binary: whatever it raises is the reason
        return Skip(f"flash_attn_interface {BROKEN}: {type(error).__name__}: {error}", fix)
    return None


def fits(shape: AttentionShape, device: torch.device, *, backward: bool) -> Skip | None:
    """FP16 and BF16 on Hopper, head sizes in multiples of 8, no mask, no dropout; lower-right diagonals."""
    del backward
    return first(
        gpu_capability("FlashAttention-3", device, (9, 0), exact=True),
        plain_heads("FlashAttention-3", shape, largest=256, lower_right=True),
        missing,
    )


def _options(problem: Problem) -> dict[str, Any]:
    packed = problem.cu_q is not None
    return {
        "softmax_scale": problem.scale,
        "is_causal": problem.causal,
        "softcap": problem.softcap,
        "window_size_left": problem.left,
        "window_size_right": problem.right,
        "cu_seqlens_q": problem.cu_q,
        "cu_seqlens_k": problem.cu_k,
        "max_seqlen_q": problem.max_q if packed else None,
        "max_seqlen_k": problem.max_k if packed else None,
    }


def _forward(q: Tensor, k: Tensor, v: Tensor, problem: Problem, **descale: Tensor) -> tuple[Tensor, Tensor]:
    importlib.import_module("flash_attn_interface")
    splits = 0 if problem.max_q <= _SHORT else 1  # 0: the package's own heuristic
    # The operator itself: its Python wrapper's fake does not take all arguments, and costs host time.
    out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, num_splits=splits, **_options(problem), **descale)
    return out, lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    torch.ops.flash_attn_3.bwd(grad, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, **_options(problem))
    return dq, dk, dv


flash_op.FORWARD["fa3"] = _forward
flash_op.BACKWARD["fa3"] = _backward


def _fits_fp8(shape: AttentionShape, device: torch.device, *, backward: bool) -> Skip | None:
    if backward:
        return Skip("FlashAttention-3 in FP8 computes the forward only", "run it under torch.no_grad()")
    if shape.head_dim % _FP8_HEADS or (shape.value_dim or shape.head_dim) % _FP8_HEADS:
        return Skip(f"FlashAttention-3 in FP8 takes head sizes that {_FP8_HEADS} divides, got {shape.head_dim}")
    return fits(shape, device, backward=False)


def _fits_with_fa4(shape: AttentionShape, device: torch.device, *, backward: bool) -> Skip | None:
    if not backward:
        return Skip("without gradients this is fa3", "impl='fa3'")
    return first(fits(shape, device, backward=True), fa4.fits(shape, device, backward=True))


def _fits_with_cudnn(shape: AttentionShape, device: torch.device, *, backward: bool) -> Skip | None:
    if not backward:
        return Skip("without gradients this is fa3", "impl='fa3'")
    if shape.packed or shape.softcap or shape.window is not None:
        return Skip("cuDNN's backward is called without softcap, window and packed documents")
    if shape.is_causal and shape.q_len != shape.kv_len:
        return Skip("FlashAttention-3 and cuDNN end the diagonal in different corners where q_len differs from kv_len")
    return first(fits(shape, device, backward=True), lambda: cudnn.fits(shape, device, backward=True))


def _quantize(tensor: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return `[b, h, s, d]` in float8_e4m3fn and its factors `[b, groups]`, one for the heads of each group."""
    batch, heads, tokens, size = tensor.shape
    grouped = tensor.float().reshape(batch, groups, heads // groups * tokens * size)
    largest = torch.finfo(torch.float8_e4m3fn).max
    factor = grouped.abs().amax(-1).clamp(min=1e-12) / largest
    scaled = (grouped / factor[..., None]).clamp(-largest, largest).to(torch.float8_e4m3fn)
    return scaled.reshape(tensor.shape), factor


_fp8 = torch.library.Library("kernel_pytorch", "FRAGMENT")
_fp8.define(
    "flash_attention_fp8(Tensor q, Tensor k, Tensor v, Tensor q_descale, Tensor k_descale, Tensor v_descale, "
    "float scale, SymInt left, SymInt right, float softcap) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _run_fp8(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    q_factor, k_factor, v_factor, *numbers = rest
    problem = Problem(None, None, q.shape[1], k.shape[1], *numbers)
    descale = {"q_descale": q_factor, "k_descale": k_factor, "v_descale": v_factor}
    with torch.cuda.device_of(q):
        return _forward(flash_op.aligned(q), flash_op.aligned(k), flash_op.aligned(v), problem, **descale)[0]


def _fake_fp8(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    del k
    return q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=torch.bfloat16)


_fp8.impl("flash_attention_fp8", _run_fp8, "CompositeExplicitAutograd")
torch.library.register_fake("kernel_pytorch::flash_attention_fp8", _fake_fp8, lib=_fp8)


def _call_fp8(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
    groups = key.shape[1]
    (q, q_factor), (k, k_factor), (v, v_factor) = (_quantize(t, groups) for t in (query, key, value))
    scale, left, right = arguments["scale"], arguments["left"], arguments["right"]
    out: Tensor = torch.ops.kernel_pytorch.flash_attention_fp8(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        q_factor,
        k_factor,
        v_factor,
        query.shape[-1] ** -0.5 if scale is None else scale,
        -1 if left is None else left,
        -1 if right is None else right,
        arguments["softcap"],
    )
    return out.transpose(1, 2).to(query.dtype)


_fa3, _fa3_packed = flash_op.calls("fa3", "fa3")
_with_fa4, _with_fa4_packed = flash_op.calls("fa3", "fa4")
_with_cudnn, _ = flash_op.calls("fa3", "cudnn")

IMPLEMENTATIONS = (
    Implementation(
        name="fa3",
        summary="FlashAttention-3, forward, and backward where the build has it",
        fits=fits,
        call=_fa3,
        call_varlen=_fa3_packed,
        packages=PACKAGES,
    ),
    Implementation(
        name="fa3+fa4",
        summary="the forward of FlashAttention-3, the backward of FlashAttention-4",
        fits=_fits_with_fa4,
        call=_with_fa4,
        forward="fa3",
        call_varlen=_with_fa4_packed,
        packages=(*PACKAGES, *fa4.PACKAGES),
    ),
    Implementation(
        name="fa3+cudnn",
        summary="the forward of FlashAttention-3, the backward of cuDNN",
        fits=_fits_with_cudnn,
        call=_with_cudnn,
        forward="fa3",
        packages=PACKAGES,
    ),
    Implementation(
        name="fa3_fp8",
        summary="FlashAttention-3 in FP8, forward only: lower precision, so only by name",
        fits=_fits_fp8,
        call=_call_fp8,
        numerics=Numerics.LOWER_PRECISION,
        rank=-1,
        packages=PACKAGES,
    ),
)
