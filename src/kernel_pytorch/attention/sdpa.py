"""PyTorch's `scaled_dot_product_attention` as it stands, with the kernel that it picks itself.

Among the candidates so that the choice is not slower than what a model would have called anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernel_pytorch.attention.gradient_layout import keep_layout
from kernel_pytorch.attention.reference import visible
from kernel_pytorch.attention.shaping import offset
from kernel_pytorch.attention.types import Alignment, AttentionShape, Bound, Implementation
from kernel_pytorch.core.types import Skip

__all__ = ["IMPLEMENTATION", "fits"]

_HALF = (torch.float16, torch.bfloat16)
_MASK_BYTES = 1 << 28
"""Of a mask that is written out for a call; more is worth another implementation."""


def fits(shape: AttentionShape, device: torch.device, *, backward: bool) -> Skip | None:
    """Any device and dtype, masks, dropout; bands other than SDPA's `is_causal` as a mask; no softcap or packing."""
    del device, backward
    if shape.softcap or shape.packed:
        return Skip(
            f"SDPA has no {'softcap' if shape.softcap else 'packed documents'}", "impl='fa4' or 'flex' on a GPU"
        )
    if not (shape.is_causal or shape.window):
        return None
    if shape.mask:
        return Skip("SDPA takes a mask or is_causal, not both")
    own = shape.is_causal and shape.alignment == "upper_left"
    if not own and shape.q_len * shape.kv_len > _MASK_BYTES:
        return Skip(
            f"SDPA would need a mask of {shape.q_len * shape.kv_len >> 20} MiB", "impl='fa4', 'flash' or 'flex'"
        )
    return None


def _is_sdpas(left: int | None, right: int | None, alignment: Alignment) -> bool:
    """Return whether a band is one that SDPA knows without a mask: all, or causal from the upper left."""
    return left is None and (right is None or (right == 0 and alignment == "upper_left"))


def _readable(tensor: Tensor) -> Tensor:
    """Return the tensor, copied where rows of half precision do not begin at multiples of eight elements.

    SDPA (torch 2.11) hands those to cuDNN, which loads rows in vectors of 16 bytes: measured on an H200, the result had
    nothing to do with the inputs (relative error 1.16).
    """
    if tensor.dtype not in _HALF:
        return tensor
    batch, head, row, column = tensor.stride()
    even = batch % 8 == 0 and head % 8 == 0 and row % 8 == 0 and offset(tensor) % 8 == 0
    return tensor if even and column == 1 else tensor.clone(memory_format=torch.contiguous_format)


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
    del softcap
    if not _is_sdpas(left, right, alignment):
        sizes = (query.shape[2], key.shape[2])
        attn_mask = visible(*sizes, left=left, right=right, alignment=alignment, device=query.device)
        right = None
    if query.is_cuda:
        query, key, value = _readable(query), _readable(key), _readable(value)
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=right == 0,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return keep_layout(out) if out.dtype in _HALF else out


def _bind(
    query: Tensor, *, dropout_p: float, left: int | None, right: int | None, alignment: Alignment, enable_gqa: bool
) -> Bound | None:
    """Return SDPA with what is decided written out: a microsecond less for each call."""
    if not _is_sdpas(left, right, alignment):
        return None
    is_causal, vectors = right == 0, query.is_cuda and query.dtype in _HALF

    def bound(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None) -> Tensor:
        if vectors:
            q, k, v = query.stride(), key.stride(), value.stride()
            odd = q[0] | q[1] | q[2] | k[0] | k[1] | k[2] | v[0] | v[1] | v[2]
            odd |= offset(query) | offset(key) | offset(value)
            if odd & 7 or not (q[3] == k[3] == v[3] == 1):
                query, key, value = _readable(query), _readable(key), _readable(value)
        out = scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return keep_layout(out) if vectors else out

    return bound


IMPLEMENTATION = Implementation(
    name="sdpa",
    summary="PyTorch's scaled_dot_product_attention with its own choice",
    fits=fits,
    call=_call,
    bind=_bind,
)
