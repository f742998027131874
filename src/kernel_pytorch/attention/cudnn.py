# mypy: disable-error-code="no-untyped-call"
# ruff: noqa: PLR0917
"""cuDNN's fused attention, by the operator that PyTorch's SDPA itself calls; Ampere and later."""

from __future__ import annotations

import torch
from torch import Tensor

from kernel_pytorch.attention import flash_op
from kernel_pytorch.attention.applies import banded, first, gpu_capability, half_precision
from kernel_pytorch.attention.flash_op import Problem
from kernel_pytorch.attention.gradient_layout import in_layout, keep_layout
from kernel_pytorch.attention.shaping import additive_mask, evenly
from kernel_pytorch.attention.types import Alignment, AttentionShape, Implementation
from kernel_pytorch.core.types import Skip

__all__ = ["IMPLEMENTATION", "fits"]


def fits(shape: AttentionShape, device: torch.device, *, backward: bool) -> Skip | None:
    """FP16 and BF16, causal from the upper left, masks, dropout; no window, softcap or packed documents."""
    del backward
    if shape.softcap or shape.packed:
        return Skip(f"cuDNN is called without {'softcap' if shape.softcap else 'packed documents'}", "impl='fa4'")
    if shape.mask and shape.is_causal:
        return Skip("cuDNN takes a mask or is_causal, not both")
    if shape.head_dim > 256:
        return Skip(f"cuDNN takes head sizes up to 256, not {shape.head_dim}")
    if not torch.backends.cudnn.is_available():
        return Skip("this build of torch has no cuDNN")
    return first(
        gpu_capability("cuDNN attention", device, (8, 0)),
        half_precision("cuDNN attention", shape),
        banded("cuDNN attention", shape, lower_right=False, window=False),
    )


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
    left: int | None,
    right: int | None,
    alignment: Alignment,
    softcap: float,
) -> Tensor:
    del left, alignment, softcap
    attn_mask = additive_mask(attn_mask, query, key.shape[2])
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    query, key, value = evenly(query), evenly(key), evenly(value)
    out, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention.default(  # noqa: SLF001
        query,
        key,
        value,
        attn_mask,
        torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
        dropout_p,
        right == 0,
        False,  # noqa: FBT003
        scale=head_dim**-0.5 if scale is None else scale,
    )
    return keep_layout(out)[..., :value_dim]


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    assert problem.cu_q is None
    assert problem.softcap == 0.0
    assert problem.left < 0
    seed = torch.empty((), dtype=torch.int64, device=q.device)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default(  # noqa: SLF001
        *(tensor.transpose(1, 2) for tensor in (in_layout(grad), q, k, v, out)),
        lse.unsqueeze(-1),
        seed,
        seed,
        None,
        None,
        None,
        problem.max_q,
        problem.max_k,
        0.0,
        problem.causal,
        scale=problem.scale,
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


flash_op.BACKWARD["cudnn"] = _backward

IMPLEMENTATION = Implementation(name="cudnn", summary="cuDNN fused attention (torch.ops.aten)", fits=fits, call=_call)
