"""PyTorch's `scaled_dot_product_attention` as it stands, with the kernel that it picks itself.

Among the candidates so that the choice is not slower than what a model would have called anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernel_pytorch.attention.applies import banded
from kernel_pytorch.attention.types import Alignment, AttentionShape, Implementation
from kernel_pytorch.core.types import Skip

__all__ = ["IMPLEMENTATION", "fits"]


def fits(shape: AttentionShape, device: torch.device, *, backward: bool) -> Skip | None:
    """Any device and dtype, upper-left diagonals, masks, dropout; no window, softcap or packed documents."""
    del device, backward
    if shape.softcap or shape.packed:
        return Skip(
            f"SDPA has no {'softcap' if shape.softcap else 'packed documents'}", "impl='fa4' or 'flex' on a GPU"
        )
    if shape.mask and shape.is_causal:
        return Skip("SDPA takes a mask or is_causal, not both")
    return banded("SDPA", shape, lower_right=False, window=False)


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
    del left, alignment, softcap
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=right == 0,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


IMPLEMENTATION = Implementation(
    name="sdpa", summary="PyTorch's scaled_dot_product_attention with its own choice", fits=fits, call=_call
)
