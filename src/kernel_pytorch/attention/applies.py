"""What several implementations require, each as a question whose answer is a `Skip` or nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernel_pytorch.attention.types import AttentionShape
from kernel_pytorch.core.types import Skip

__all__ = ["banded", "first", "gpu_capability", "half_precision", "plain_heads"]

_HALF = (torch.float16, torch.bfloat16)


def first(*answers: Skip | Callable[[], Skip | None] | None) -> Skip | None:
    """Return the first reason; functions are asked in order and only while there is none."""
    for answer in answers:
        found = answer() if callable(answer) else answer
        if found is not None:
            return found
    return None


def gpu_capability(name: str, device: torch.device, *allowed: tuple[int, int], exact: bool = False) -> Skip | None:
    """Require an NVIDIA GPU of at least (or exactly) one of these compute capabilities."""
    if device.type != "cuda" or torch.version.cuda is None:
        return Skip(f"{name} runs on NVIDIA GPUs, the tensors are on {device.type}")
    have = torch.cuda.get_device_capability(device)
    if have in allowed if exact else have >= min(allowed):
        return None
    need = " or ".join(f"{major}.{minor}" for major, minor in allowed)
    return Skip(
        f"{name} needs compute capability {need}{'' if exact else ' or newer'}, this GPU has {have[0]}.{have[1]}"
    )


def half_precision(name: str, shape: AttentionShape, *, also: tuple[torch.dtype, ...] = ()) -> Skip | None:
    """Require FP16 or BF16, or a dtype named."""
    if shape.dtype in (*_HALF, *also):
        return None
    return Skip(f"{name} computes in float16 and bfloat16, not {str(shape.dtype).removeprefix('torch.')}")


def banded(name: str, shape: AttentionShape, *, lower_right: bool, window: bool) -> Skip | None:
    """Require a mask of the kind that is built in: none, causal, perhaps a window, with this alignment."""
    if shape.window is not None and not window:
        return Skip(f"{name} has no sliding window", "impl='fa4' or 'flex' on a GPU")
    if (shape.is_causal or shape.window is not None) and (shape.packed or shape.q_len != shape.kv_len):
        wanted = "lower_right" if lower_right else "upper_left"
        if shape.alignment != wanted:
            return Skip(
                f"{name} ends the diagonal at {wanted} where q_len ({shape.q_len}) is not kv_len ({shape.kv_len})",
                f"alignment='{wanted}', if that is what is meant",
            )
    if shape.window is not None and any(w is not None and w < 0 for w in shape.window):
        return Skip(f"{name} takes no negative window")
    return None


def plain_heads(
    name: str, shape: AttentionShape, *, largest: int, lower_right: bool, softcap: bool = True
) -> Skip | None:
    """Require what the FlashAttention packages do: half precision, heads in multiples of 8, no mask, no dropout."""
    if shape.mask:
        return Skip(f"{name} takes no attn_mask", "is_causal or window, if the mask is one of them")
    if shape.dropout > 0.0:
        return Skip(f"{name} has no dropout", "dropout_p=0")
    if shape.softcap and not softcap:
        return Skip(f"{name} has no softcap")
    if shape.value_dim:
        return Skip(f"{name} is used with equal head sizes only, here {shape.head_dim} and {shape.value_dim}")
    if shape.head_dim % 8 or shape.head_dim > largest:
        return Skip(f"{name} takes head sizes in multiples of 8 up to {largest}, not {shape.head_dim}")
    return first(half_precision(name, shape), banded(name, shape, lower_right=lower_right, window=True))
