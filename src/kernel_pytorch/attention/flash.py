# ruff: noqa: PLR0917
"""PyTorch's own flash attention: FlashAttention-2 on GPUs, a blocked kernel on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from kernel_pytorch.attention.applies import banded, first, gpu_capability, half_precision
from kernel_pytorch.attention.shaping import additive_mask, evenly, every_head, to_eighths
from kernel_pytorch.attention.types import Alignment, AttentionShape, Implementation
from kernel_pytorch.core.types import Skip

__all__ = ["IMPLEMENTATION", "fits"]

_CPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fits(shape: AttentionShape, device: torch.device, *, backward: bool) -> Skip | None:
    """On GPUs FP16 and BF16, lower-right diagonals, windows, dropout; on CPUs any dtype, upper-left, masks."""
    if shape.softcap:
        return Skip("PyTorch's flash attention has no softcap", "impl='fa4' or 'flex' on a GPU")
    if shape.value_dim:
        return Skip(f"flash attention takes equal head sizes, here {shape.head_dim} and {shape.value_dim}")
    if device.type == "cpu":
        return _fits_cpu(shape, backward=backward)
    if shape.mask:
        return Skip("PyTorch's flash attention takes no attn_mask on GPUs")
    if shape.head_dim > 256:
        return Skip(f"PyTorch's flash attention takes head sizes up to 256, not {shape.head_dim}")
    return first(
        gpu_capability("PyTorch's flash attention", device, (8, 0)),
        half_precision("PyTorch's flash attention", shape),
        banded("PyTorch's flash attention", shape, lower_right=True, window=True),
    )


def _fits_cpu(shape: AttentionShape, *, backward: bool) -> Skip | None:
    if shape.packed or shape.dropout > 0.0:
        return Skip(f"flash attention on CPUs has no {'packed documents' if shape.packed else 'dropout'}")
    if shape.dtype not in _CPU_DTYPES:
        return Skip(f"flash attention on CPUs does not compute in {shape.dtype}")
    if shape.mask and (shape.is_causal or backward):
        # Its backward of a mask that needs a gradient is not there, and both masks together are not allowed.
        return Skip("flash attention on CPUs takes a mask without is_causal, and forward only")
    return banded("flash attention on CPUs", shape, lower_right=False, window=False)


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
    del alignment, softcap
    head_dim = query.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    if query.device.type == "cpu":
        out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(  # noqa: SLF001
            query,
            every_head(key, query.shape[1]),
            every_head(value, query.shape[1]),
            dropout_p,
            right == 0,
            attn_mask=additive_mask(attn_mask, query, key.shape[2]),
            scale=scale,
        )
        result: Tensor = out
        return result
    query, key, value = evenly(query), evenly(key), evenly(value)
    out = _flash(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        None,
        None,
        query.shape[2],
        key.shape[2],
        dropout_p=dropout_p,
        scale=scale,
        left=left,
        right=right,
    )
    return out.transpose(1, 2)[..., :head_dim]


def _call_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    left: int | None,
    right: int | None,
    softcap: float,
) -> Tensor:
    del softcap
    head_dim = query.shape[-1]
    query, key, value = to_eighths(query), to_eighths(key), to_eighths(value)
    out = _flash(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_q,
        max_k,
        dropout_p=0.0,
        scale=head_dim**-0.5 if scale is None else scale,
        left=left,
        right=right,
    )
    return out[..., :head_dim]


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    dropout_p: float,
    scale: float,
    left: int | None,
    right: int | None,
) -> Tensor:
    out, *_ = torch.ops.aten._flash_attention_forward.default(  # noqa: SLF001
        query,
        key,
        value,
        cu_q,
        cu_k,
        max_q,
        max_k,
        dropout_p,
        left is None and right == 0,
        False,  # noqa: FBT003
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    result: Tensor = out
    return result


IMPLEMENTATION = Implementation(
    name="flash",
    summary="PyTorch's flash attention (torch.ops.aten): FlashAttention-2 on GPUs",
    fits=fits,
    call=_call,
    call_varlen=_call_varlen,
)
