"""PyTorch's memory-efficient attention (CUTLASS kernels from xFormers), by the operator that SDPA itself calls."""

from __future__ import annotations

import torch
from torch import Tensor

from kernel_pytorch.attention.applies import banded, first, gpu_capability, half_precision
from kernel_pytorch.attention.shaping import additive_mask, evenly, every_head
from kernel_pytorch.attention.types import Alignment, AttentionShape, Implementation
from kernel_pytorch.core.types import Skip

__all__ = ["IMPLEMENTATION", "fits"]

_LOWER_RIGHT = 2
"""The kernel's `custom_mask_type`."""


def fits(shape: AttentionShape, device: torch.device, *, backward: bool) -> Skip | None:
    """FP16, BF16, FP32, masks, dropout, diagonals (lower right: forward only); no window, softcap or packing."""
    name = "memory-efficient attention"
    if backward and shape.is_causal and shape.alignment == "lower_right":
        return Skip(f"{name} with a lower-right diagonal computes the forward only: torch cannot trace more")
    if shape.softcap or shape.packed:
        return Skip(f"{name} has no {'softcap' if shape.softcap else 'packed documents here'}", "impl='fa4'")
    if shape.mask and shape.is_causal:
        return Skip(f"{name} takes a mask or is_causal, not both")
    return first(
        gpu_capability(name, device, (5, 0)),
        half_precision(name, shape, also=(torch.float32,)),
        banded(name, shape, lower_right=shape.alignment == "lower_right", window=False),
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
    del left, softcap
    heads, head_dim, value_dim = query.shape[1], query.shape[-1], value.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    wants_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    bias = additive_mask(attn_mask, query, key.shape[2])
    query, key, value = evenly(query), every_head(evenly(key), heads), every_head(evenly(value), heads)
    if right is not None and alignment == "lower_right":
        out = torch.ops.aten._efficient_attention_forward.default(  # noqa: SLF001
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            None,
            None,
            None,
            None,
            None,
            dropout_p,
            _LOWER_RIGHT,
            False,  # noqa: FBT003
            scale=scale,
        )[0].transpose(1, 2)
    else:
        out = torch.ops.aten._scaled_dot_product_efficient_attention.default(  # noqa: SLF001
            query, key, value, bias, wants_grad, dropout_p, right is not None, scale=scale
        )[0]
    result: Tensor = out[..., :value_dim]
    return result


IMPLEMENTATION = Implementation(
    name="efficient", summary="PyTorch's memory-efficient attention (torch.ops.aten)", fits=fits, call=_call
)
