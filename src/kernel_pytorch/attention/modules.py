# mypy: disable-error-code="no-untyped-call"
# ruff: noqa: PLR0917
"""Attention as modules: one with the interface and keys of `nn.MultiheadAttention`, one with groups and rotation."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kernel_pytorch.attention.api import attention
from kernel_pytorch.attention.types import Alignment, AttentionError, Window

__all__ = ["MultiheadAttention", "RotaryAttention"]


class MultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with the same arguments and `state_dict` keys, computed by `attention`.

    Differences: `impl` names an implementation. With `need_weights=True` (the default of the interface) the weights are
    an output, which no fused kernel stores, so PyTorch's own code computes both; pass `need_weights=False`.

    Args:
        embed_dim: Size of a token.
        num_heads: Heads.
        dropout: Probability at which a weight is dropped in training.
        bias: Whether the projections have biases.
        add_bias_kv: Whether keys and values get a learned token.
        add_zero_attn: Whether they get a token of zeros.
        kdim: Size of a key token; `embed_dim` by default.
        vdim: Size of a value token; `embed_dim` by default.
        batch_first: Whether tensors are `[batch, tokens, size]`, not `[tokens, batch, size]`.
        device: Of the parameters.
        dtype: Of the parameters.
        impl: Implementation of `attention`; the fastest by default.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,  # noqa: FBT001, FBT002 - the interface
        add_bias_kv: bool = False,  # noqa: FBT001, FBT002
        add_zero_attn: bool = False,  # noqa: FBT001, FBT002
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,  # noqa: FBT001, FBT002
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        impl: str | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.impl = impl

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,  # noqa: FBT001, FBT002
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: FBT001, FBT002
        is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output and, if asked for, the weights; arguments as `nn.MultiheadAttention.forward`.

        Masks: boolean ones are true where a position does *not* take part, as in that interface.
        """
        if is_causal and attn_mask is None:
            raise AttentionError(
                "is_causal is a hint about attn_mask, which is missing", fix="pass the causal attn_mask"
            )
        if need_weights or self.bias_k is not None or self.add_zero_attn:
            result: tuple[Tensor, Tensor | None] = super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
            return result
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = (_split(tensor, self.num_heads) for tensor in self._project(query, key, value))
        causal = is_causal and key_padding_mask is None
        out = attention(
            q,
            k,
            v,
            attn_mask=None if causal else _merge(attn_mask, key_padding_mask, q, k.shape[2]),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
            impl=self.impl,
        )
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        biases: tuple[Tensor | None, ...] = (None,) * 3
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.chunk(3)
        if self._qkv_same_embed_dim:
            weight = cast("Tensor", self.in_proj_weight)
            if query is key and key is value:
                q, k, v = linear(query, weight, self.in_proj_bias).chunk(3, -1)
                return q, k, v
            weights: tuple[Tensor, ...] = weight.chunk(3)
        else:
            weights = cast("tuple[Tensor, ...]", (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight))
        q, k, v = (linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        return q, k, v


def _split(tensor: Tensor, heads: int) -> Tensor:
    """Turn `[batch, tokens, heads * size]` into `[batch, heads, tokens, size]`."""
    return tensor.reshape(*tensor.shape[:-1], heads, -1).transpose(1, 2)


def _merge(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, kv_len: int) -> Tensor | None:
    """Return both masks of the `nn.MultiheadAttention` interface as one of `attention`'s."""
    batch, heads, q_len, _ = q.shape
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.reshape(batch, heads, q_len, kv_len)
    if padding is not None:
        padding = padding.reshape(batch, 1, 1, kv_len)
    masks = [mask for mask in (attn_mask, padding) if mask is not None]
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        hidden = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return ~hidden
    total = torch.zeros((), dtype=q.dtype, device=q.device)
    for mask in masks:
        if mask.dtype == torch.bool:
            total = total + torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
        else:
            total = total + mask.to(q.dtype)
    return total


class RotaryAttention(nn.Module):
    """Self-attention with grouped key heads and rotary positions, as in Llama.

    Ainslie et al., arXiv:2305.13245 (groups); Su et al., arXiv:2104.09864 (rotation: the halves of a head are the two
    coordinates, as in Hugging Face's Llama). Parameters are named `q_proj k_proj v_proj o_proj`.

    Args:
        embed_dim: Size of a token.
        num_heads: Query heads.
        num_kv_heads: Key heads; `num_heads` by default.
        head_dim: Size of a head; `embed_dim // num_heads` by default; even.
        theta: Base of the rotation's wavelengths.
        bias: Whether the projections have biases.
        is_causal: Whether a token sees none after it.
        window: `(left, right)` tokens that a token sees, see `attention`.
        softcap: See `attention`.
        dropout: Probability at which a weight is dropped in training.
        impl: Implementation of `attention`; the fastest by default.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        theta: float = 10_000.0,
        bias: bool = False,
        is_causal: bool = True,
        window: Window | None = None,
        softcap: float = 0.0,
        dropout: float = 0.0,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if head_dim is None and embed_dim % num_heads:
            raise AttentionError(f"num_heads ({num_heads}) does not divide embed_dim ({embed_dim})", fix="set head_dim")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_dim = head_dim or embed_dim // num_heads
        if self.head_dim % 2:
            raise AttentionError(f"rotation turns pairs, but head_dim is {self.head_dim}")
        if num_heads % self.num_kv_heads:
            raise AttentionError(f"{self.num_kv_heads} key heads do not divide {num_heads} query heads")
        self.theta, self.is_causal, self.window, self.softcap = theta, is_causal, window, softcap
        self.dropout, self.impl = dropout, impl

        def projection(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        self.q_proj = projection(embed_dim, num_heads * self.head_dim)
        self.k_proj = projection(embed_dim, self.num_kv_heads * self.head_dim)
        self.v_proj = projection(embed_dim, self.num_kv_heads * self.head_dim)
        self.o_proj = projection(num_heads * self.head_dim, embed_dim)

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        past: tuple[Tensor, Tensor] | None = None,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the output and the keys and values to pass as `past` with the tokens that follow.

        Args:
            x: `[batch, tokens, embed_dim]`.
            positions: Of the tokens, `[tokens]` or `[batch, tokens]`; counted on from `past` by default.
            past: Rotated keys and values of earlier tokens, `[batch, num_kv_heads, tokens, head_dim]` each.
            attn_mask: See `attention`; takes the place of `is_causal`.
        """
        q, k = _split(self.q_proj(x), self.num_heads), _split(self.k_proj(x), self.num_kv_heads)
        v = _split(self.v_proj(x), self.num_kv_heads)
        before = 0 if past is None else past[0].shape[2]
        if positions is None:
            positions = torch.arange(before, before + x.shape[1], device=x.device)
        q, k = self._rotate(q, positions), self._rotate(k, positions)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        alignment: Alignment = "lower_right"
        out = attention(
            q,
            k,
            v,
            attn_mask=attn_mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.is_causal and attn_mask is None,
            enable_gqa=True,
            alignment=alignment,
            window=self.window,
            softcap=self.softcap,
            impl=self.impl,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), (k, v)

    def _rotate(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Rotate pairs of coordinates by angles that grow with the position, in float32 at least."""
        exact = torch.float64 if heads.dtype == torch.float64 else torch.float32
        steps = torch.arange(0, self.head_dim, 2, device=heads.device, dtype=exact) / self.head_dim
        angles = positions.to(exact)[..., None] * self.theta**-steps
        if angles.dim() == 3:
            angles = angles[:, None]
        cos, sin = angles.cos(), angles.sin()
        one, two = heads.to(exact).chunk(2, -1)
        return torch.cat((one * cos - two * sin, two * cos + one * sin), -1).to(heads.dtype)
