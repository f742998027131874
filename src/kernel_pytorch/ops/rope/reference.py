"""The definition of rotary position embedding, in plain PyTorch, differentiable, in any floating-point dtype."""

from __future__ import annotations

import torch

__all__ = ["rope_reference"]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    wide = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    exact, c, s = x.to(wide), cos.to(wide), sin.to(wide)
    if interleaved:
        first, second = exact[..., 0::2], exact[..., 1::2]
        turned = torch.stack((first * c - second * s, second * c + first * s), dim=-1).flatten(-2)
    else:
        first, second = exact.chunk(2, dim=-1)
        if c.shape[-1] == x.shape[-1]:  # each half has its own
            (c, c_second), (s, s_second) = c.chunk(2, dim=-1), s.chunk(2, dim=-1)
        else:
            c_second, s_second = c, s
        turned = torch.cat((first * c - second * s, second * c_second + first * s_second), dim=-1)
    return turned.to(x.dtype)


def rope_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, layout: str, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn each pair of elements of a head by the angle of its position; computed in float32 or wider, rounded once.

    Args:
        q: `[batch, heads, sequence, d]` or, for layout `bshd`, `[batch, sequence, heads, d]`.
        k: The same, with its own number of heads.
        cos: `[sequence, d / 2]` or `[batch or 1, sequence, d / 2]`; or `d` wide, one for each element, where the
            pairs are `(i, i + d / 2)`.
        sin: Like `cos`.
        layout: `bhsd` or `bshd`.
        interleaved: Whether a pair is `(2 i, 2 i + 1)`, else `(i, i + d / 2)` as in Hugging Face's models.
    """
    heads = 1 if layout == "bhsd" else 2
    c, s = ((t if t.dim() == 3 else t[None]).unsqueeze(heads) for t in (cos, sin))
    return _rotate(q, c, s, interleaved=interleaved), _rotate(k, c, s, interleaved=interleaved)
