"""Inputs brought into the form that a kernel takes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["additive_mask", "evenly", "every_head", "offset", "to_eighths"]


def offset(tensor: Tensor) -> int:
    """Return where a tensor begins in its storage, in elements; 0 while Dynamo traces, which cannot ask for it.

    Compiled code copies inputs that are not aligned by itself.
    """
    return 0 if torch.compiler.is_compiling() else int(tensor.storage_offset())


def to_eighths(tensor: Tensor) -> Tensor:
    """Return the tensor with its last dimension padded by zeros to a multiple of eight, which changes no score."""
    rest = -tensor.shape[-1] % 8
    return pad(tensor, (0, rest)) if rest else tensor


def evenly(tensor: Tensor) -> Tensor:
    """Return `[batch, heads, tokens, head_dim]`, heads padded, copied where rows do not begin at multiples of eight.

    PyTorch's kernels load rows in vectors of eight elements; decided by strides alone, so that it can be traced.
    """
    tensor = to_eighths(tensor)
    steps = (tensor.stride(0), tensor.stride(1), tensor.stride(2), offset(tensor))
    if tensor.stride(3) == 1 and all(step % 8 == 0 for step in steps):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def every_head(tensor: Tensor, heads: int) -> Tensor:
    """Repeat key or value heads for each query head of their group: `[batch, heads, tokens, head_dim]`."""
    groups = heads // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def additive_mask(mask: Tensor | None, query: Tensor, kv_len: int) -> Tensor | None:
    """Return a mask as numbers to add, in the query's dtype and expanded to `[batch, heads, q_len, kv_len]`.

    Rows begin at multiples of 16 elements: the kernels read them in vectors.
    """
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    mask = mask.to(query.dtype)
    if kv_len % 16:
        mask = mask.expand(*mask.shape[:-1], kv_len)
        mask = pad(mask, (0, -kv_len % 16))[..., :kv_len]
    return mask.expand(*query.shape[:3], kv_len)
