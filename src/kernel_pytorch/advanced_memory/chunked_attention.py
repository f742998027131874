# mypy: disable-error-code="no-untyped-call"
"""Attention by chunks of queries in plain PyTorch, forward and backward: scores of one chunk are alive at a time.

For programs that a partitioner splits over devices, which kernels cannot be: every operator here is one it knows. The
backward computes probabilities again from the log-sum-exp of the forward (Dao et al. 2022, arXiv:2205.14135).
"""

from __future__ import annotations

from typing import Any

import torch

from kernel_pytorch.advanced_memory.barrier import hold_apart

__all__ = ["chunked_attention"]


def chunked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool, scale: float, rows: int = 256
) -> torch.Tensor:
    """Return `softmax(query @ key.T * scale) @ value`.

    Args:
        query: `[batch, heads, queries, width]`, any floating-point dtype.
        key: `[batch, heads, keys, width]`, the same dtype.
        value: `[batch, heads, keys, width]`, the same dtype.
        causal: Query i sees keys up to i; as many queries as keys then.
        scale: Factor of the scores.
        rows: Queries of a chunk.

    Returns:
        `[batch, heads, queries, width]`, in the dtype of `query`; scores and their softmax are fp32 (fp64 of fp64).
    """
    assert rows > 0, rows
    assert not causal or query.shape[-2] == key.shape[-2], (query.shape, key.shape)
    result: torch.Tensor = _ChunkedAttention.apply(query, key, value, causal, scale, rows)
    return result


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        causal: bool,  # noqa: FBT001
        scale: float,
        rows: int,
    ) -> torch.Tensor:
        results: list[torch.Tensor] = []
        sums: list[torch.Tensor] = []
        for start in range(0, query.shape[-2], rows):
            q, k, v = query[..., start : start + rows, :], key, value
            if results:
                # What came before is waited for, so that one chunk's scores are alive at a time.
                q, results[-1] = hold_apart([q, results[-1]])
            seen = start + q.shape[-2] if causal else key.shape[-2]
            scores = _scores(q, k[..., :seen, :], causal, scale, start)
            lse = scores.logsumexp(-1, keepdim=True)
            results.append((scores - lse).exp().to(v.dtype) @ v[..., :seen, :])
            sums.append(lse)
        result = torch.cat(results, -2)
        ctx.save_for_backward(query, key, value, result, torch.cat(sums, -2))
        ctx.options = (causal, scale, rows)
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, result, sums = ctx.saved_tensors
        causal, scale, rows = ctx.options
        wide = sums.dtype
        inner = (grad.to(wide) * result.to(wide)).sum(-1, keepdim=True)
        d_query: list[torch.Tensor] = []
        sums_of: list[torch.Tensor] = []
        for start in range(0, query.shape[-2], rows):
            part = slice(start, min(start + rows, query.shape[-2]))
            q, g = query[..., part, :], grad[..., part, :]
            if d_query:
                q, g, *sums_of = hold_apart([q, g, *sums_of])
            seen = part.stop if causal else key.shape[-2]
            k, v = key[..., :seen, :], value[..., :seen, :]
            probabilities = (_scores(q, k, causal, scale, start) - sums[..., part, :]).exp()
            slopes = (probabilities * ((g @ v.mT).to(wide) - inner[..., part, :]) * scale).to(query.dtype)
            d_query.append(slopes @ k)
            both = torch.cat([(slopes.mT @ q).to(wide), (probabilities.to(g.dtype).mT @ g).to(wide)], -1)
            sums_of = _added(sums_of, list(both.split(rows, -2)))
        d_key, d_value = torch.cat(sums_of, -2).split([key.shape[-1], value.shape[-1]], -1)
        return torch.cat(d_query, -2), d_key.to(key.dtype), d_value.to(value.dtype), None, None, None


def _scores(query: torch.Tensor, key: torch.Tensor, causal: bool, scale: float, start: int) -> torch.Tensor:  # noqa: FBT001
    scores = (query @ key.mT).to(torch.promote_types(query.dtype, torch.float32)) * scale
    if not causal:
        return scores
    # Behind a barrier, or the compiler folds the mask, for all heads, into a constant of the program.
    rows, columns = hold_apart([torch.arange(n, device=query.device) for n in scores.shape[-2:]])
    return scores.masked_fill(columns > rows[:, None] + start, float("-inf"))


def _added(totals: list[torch.Tensor], more: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return sums block by block of keys: a causal chunk brings one block more than the one before."""
    return [a + b for a, b in zip(totals, more, strict=False)] + more[len(totals) :]
