# ruff: noqa: PLR0917
"""The definition of attention in plain PyTorch: any floating dtype (float64 is the oracle), device and argument."""

from __future__ import annotations

import torch

from kernel_pytorch.attention.types import Alignment, AttentionShape
from kernel_pytorch.core.types import Skip

__all__ = ["attend", "attend_varlen", "fits", "visible"]


def visible(
    q_len: int,
    kv_len: int,
    *,
    left: int | None,
    right: int | None,
    alignment: Alignment,
    device: torch.device,
    rows: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Return which keys each query sees, boolean `[queries, kv_len]`; `None` where all are seen.

    Args:
        q_len: Query tokens.
        kv_len: Key tokens.
        left: Keys seen before the diagonal; `None`: all.
        right: Keys seen after it; `None`: all.
        alignment: Where the diagonal ends.
        device: Where to make it.
        rows: Indices of the queries wanted; all by default.
    """
    if left is None and right is None:
        return None
    offset = kv_len - q_len if alignment == "lower_right" else 0
    if rows is None:
        rows = torch.arange(q_len, device=device)
    distance = torch.arange(kv_len, device=device)[None, :] - (rows[:, None] + offset)
    if left is None:
        assert right is not None
        return distance <= right
    if right is None:
        return distance >= -left
    return (distance >= -left) & (distance <= right)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    left: int | None = None,
    right: int | None = None,
    alignment: Alignment = "upper_left",
    softcap: float = 0.0,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `softmax(cap(scale * q k^T) + mask) v`; a query that sees no key gives zeros.

    Half-precision inputs are computed in float32 and rounded at the end.

    Args:
        query: `[batch, heads, q_len, head_dim]`.
        key: `[batch, kv_heads, kv_len, head_dim]`; query head `h` uses key head `h // (heads // kv_heads)`.
        value: `[batch, kv_heads, kv_len, value_dim]`.
        attn_mask: Boolean (true: takes part) or added to the scores; broadcasts to `[batch, heads, q_len, kv_len]`.
        dropout_p: Probability at which a weight becomes zero; the others grow by `1 / (1 - p)`.
        scale: Factor of the scores; `head_dim ** -0.5` by default.
        left: Keys seen before the diagonal, see `visible`.
        right: Keys seen after it.
        alignment: Where the diagonal ends.
        softcap: Scores `s` become `softcap * tanh(s / softcap)`, before the mask (Gemma 2, arXiv:2408.00118); 0: not.
        rows: Compute these queries only, `[queries]`: a sample of a large problem. Without `attn_mask`.
    """
    q_len, kv_len, dtype = query.shape[-2], key.shape[-2], query.dtype
    seen = visible(q_len, kv_len, left=left, right=right, alignment=alignment, device=query.device, rows=rows)
    if rows is not None:
        assert attn_mask is None
        query = query[..., rows, :]
    if dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    batch, heads, queries, head_dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, queries, head_dim)
    scores = grouped @ key.unsqueeze(2).transpose(-1, -2)
    scores = scores.reshape(batch, heads, queries, kv_len) * (head_dim**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            seen = attn_mask if seen is None else seen & attn_mask
        else:
            scores = scores + attn_mask.to(scores.dtype)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    if seen is None and attn_mask is None:
        weights = torch.softmax(scores, -1)
    else:
        # A row of -inf alone: softmax gives NaN, in its gradient too, so the row is made finite first.
        blind = (scores == float("-inf")).all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    if dropout_p > 0.0:
        weights = torch.dropout(weights, dropout_p, train=True)
    weights = weights.reshape(batch, kv_heads, heads // kv_heads, queries, kv_len)
    out = weights @ value.unsqueeze(2)
    return out.reshape(batch, heads, queries, value.shape[-1]).to(dtype)


def attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    left: int | None = None,
    right: int | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Compute packed documents, each by itself, the diagonal ending in its lower right corner.

    Pads the documents to `max_q` and `max_k`, so that no length has to leave the device.

    Args:
        query: `[total_q, heads, head_dim]`.
        key: `[total_k, kv_heads, head_dim]`.
        value: `[total_k, kv_heads, value_dim]`.
        cu_seqlens_q: Where documents begin and the last ends, int32 `[documents + 1]`.
        cu_seqlens_k: Likewise for the keys.
        max_q: The longest document's queries, or more.
        max_k: Its keys, or more.
        scale: As in `attend`.
        left: As in `attend`.
        right: As in `attend`.
        softcap: As in `attend`.
    """
    device = query.device
    q_len, k_len = cu_seqlens_q.diff().long(), cu_seqlens_k.diff().long()
    q_at, k_at = torch.arange(max_q, device=device), torch.arange(max_k, device=device)
    q_in, k_in = q_at < q_len[:, None], k_at < k_len[:, None]
    q_from = (cu_seqlens_q[:-1, None] + q_at).clamp(max=query.shape[0] - 1)
    k_from = (cu_seqlens_k[:-1, None] + k_at).clamp(max=key.shape[0] - 1)
    distance = k_at[None, None, :] - (q_at[None, :, None] + (k_len - q_len)[:, None, None])
    seen = k_in[:, None, :] & q_in[:, :, None]
    if left is not None:
        seen = seen & (distance >= -left)
    if right is not None:
        seen = seen & (distance <= right)
    padded = [tensor[at].transpose(1, 2) for tensor, at in ((query, q_from), (key, k_from), (value, k_from))]
    out = attend(*padded, attn_mask=seen[:, None], scale=scale, softcap=softcap).transpose(1, 2)
    # Row r of the packed batch is row r - start of its document.
    row = torch.arange(query.shape[0], device=device)
    document = torch.searchsorted(cu_seqlens_q[1:].contiguous(), row, right=True).clamp(max=q_len.numel() - 1)
    return out[document, row - cu_seqlens_q[document]]


def fits(shape: AttentionShape, device: torch.device, *, backward: bool) -> Skip | None:
    """The definition computes everything, on every device."""
    del device, backward
    return None if shape.dtype.is_floating_point else Skip(f"attention of {shape.dtype} is not defined")
