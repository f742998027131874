# ruff: noqa: PLR0917
"""FlexAttention: a Triton (on CPUs C++) kernel that `torch.compile` writes for the mask and softcap at hand.

Dong et al., arXiv:2412.05496. It compiles for seconds for each shape, so `impl=None` considers it only where no
finished kernel computes what is asked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernel_pytorch.attention.applies import first
from kernel_pytorch.attention.types import Alignment, AttentionShape, Implementation
from kernel_pytorch.core.types import Skip

__all__ = ["IMPLEMENTATION", "fits"]

_BLOCK = 128


def fits(shape: AttentionShape, device: torch.device, *, backward: bool) -> Skip | None:
    """Bands of any kind and softcap; no mask, dropout or packed documents; on CPUs forward only."""
    if shape.mask or shape.packed or shape.dropout > 0.0:
        what = "attn_mask" if shape.mask else "packed documents" if shape.packed else "dropout"
        return Skip(f"FlexAttention is called without {what}")
    if device.type == "cpu" and backward:
        return Skip("FlexAttention on CPUs computes the forward only", "run it under torch.no_grad()")
    if shape.dtype == torch.float64:
        return Skip("FlexAttention does not compute in float64")
    return first(lambda: _uncompilable(device.type))


@functools.cache
def _uncompilable(device_type: str) -> Skip | None:
    from kernel_pytorch.hardware import detect

    features = detect(device_type).features
    if device_type == "cpu":
        if "cxx_compiler" in features and any("avx" in name or "amx" in name for name in features):
            return None
        return Skip("FlexAttention on CPUs needs a C++ compiler and AVX", "apt-get install g++ python3-dev")
    if torch.utils._triton.has_triton():  # noqa: SLF001 - what torch.compile itself asks
        return None
    return Skip("FlexAttention needs triton", "pip install triton")


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
    assert attn_mask is None
    assert dropout_p == 0.0
    q_len, kv_len = query.shape[2], key.shape[2]
    offset = kv_len - q_len if alignment == "lower_right" else 0
    blocks = None
    if left is not None or right is not None:
        blocks = _blocks(q_len, kv_len, offset, left, right, query.device)
    from torch.nn.attention.flex_attention import flex_attention

    run: Any = flex_attention if torch.compiler.is_compiling() else _compiled()
    out: Tensor = run(
        query,
        key,
        value,
        score_mod=_cap(softcap) if softcap else None,
        block_mask=blocks,
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _cap(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        del b, h, q, k
        return softcap * torch.tanh(score / softcap)

    return capped


def _band(offset: int, left: int | None, right: int | None) -> Callable[..., Tensor]:
    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        del b, h
        if left is None:
            return k - q <= offset + (right or 0)
        if right is None:
            return k - q >= offset - left
        return (k - q <= offset + right) & (k - q >= offset - left)

    return seen


def _blocks(q_len: int, kv_len: int, offset: int, left: int | None, right: int | None, device: torch.device) -> Any:
    """Return the `BlockMask` of a band, computed from its bounds: `create_block_mask` would look at every score."""
    from torch.nn.attention.flex_attention import BlockMask

    rows, columns = (q_len + _BLOCK - 1) // _BLOCK, (kv_len + _BLOCK - 1) // _BLOCK
    first_q = (torch.arange(rows, device=device) * _BLOCK)[:, None]
    first_k = (torch.arange(columns, device=device) * _BLOCK)[None, :]
    last_q, last_k = (first_q + _BLOCK - 1).clamp(max=q_len - 1), (first_k + _BLOCK - 1).clamp(max=kv_len - 1)
    some = torch.ones(rows, columns, dtype=torch.bool, device=device)
    every = (first_q + _BLOCK <= q_len) & (first_k + _BLOCK <= kv_len)  # blocks over the edge are masked inside
    if right is not None:
        some = some & (first_k <= last_q + offset + right)
        every = every & (last_k <= first_q + offset + right)
    if left is not None:
        some = some & (last_k >= first_q + offset - left)
        every = every & (first_k >= last_q + offset - left)
    partial, full = _ordered(some & ~every), _ordered(some & every)
    return BlockMask.from_kv_blocks(
        *partial,
        *full,
        BLOCK_SIZE=_BLOCK,
        mask_mod=_band(offset, left, right),
        seq_lengths=(q_len, kv_len),
    )


def _ordered(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return, per row of blocks, how many are wanted and their indices first."""
    count = wanted.sum(-1, dtype=torch.int32)[None, None]
    order = torch.argsort(wanted.to(torch.int8), dim=-1, descending=True, stable=True)
    return count, order.to(torch.int32)[None, None]


IMPLEMENTATION = Implementation(
    name="flex",
    summary="FlexAttention (torch.compile writes the kernel)",
    fits=fits,
    call=_call,
    rank=1,
)
