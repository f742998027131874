"""PyTorch's memory-efficient attention (CUTLASS kernels from xFormers), by the operator that SDPA itself calls."""

from __future__ import annotations

import torch
from torch import Tensor

from kernel_pytorch.attention.applies import banded, first, gpu_capability, half_precision
from kernel_pytorch.attention.shaping import additive_mask, evenly, every_head
from kernel_pytorch.attention.types import Alignment, AttentionShape, Implementation
from kernel_pytorch.core.types import Skip

__all__ = ["IMPLEMENTATION", "fits"]

_NONE, _UPPER_LEFT, _LOWER_RIGHT = 0, 1, 2
"""The kernel's `custom_mask_type`."""


def fits(shape: AttentionShape, device: torch.device, *, backward: bool) -> Skip | None:
    """FP16, BF16 and FP32, both diagonals, masks, dropout; no window, softcap or packed documents."""
    del backward
    name = "memory-efficient attention"
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
    diagonal = _NONE if right is None else _LOWER_RIGHT if alignment == "lower_right" else _UPPER_LEFT
    wants_grad = query.requires_grad or key.requires_grad or value.requires_grad
    out, *_ = torch.ops.aten._efficient_attention_forward.default(  # noqa: SLF001
        evenly(query).transpose(1, 2),
        every_head(evenly(key), heads).transpose(1, 2),
        every_head(evenly(value), heads).transpose(1, 2),
        additive_mask(attn_mask, query, key.shape[2]),
        None,
        None,
        None,
        None,
        dropout_p,
        diagonal,
        torch.is_grad_enabled() and wants_grad,
        scale=head_dim**-0.5 if scale is None else scale,
    )
    result: Tensor = out.transpose(1, 2)
    return result[..., :value_dim]


IMPLEMENTATION = Implementation(
    name="efficient", summary="PyTorch's memory-efficient attention (torch.ops.aten)", fits=fits, call=_call
)
