"""What users call: `rope`, and `unsupported`, which says where its kernel does not run."""

from __future__ import annotations

from typing import Literal

import torch

from kernel_pytorch._triton.launch import cannot_run
from kernel_pytorch.core.types import Skip
from kernel_pytorch.errors import InputsError
from kernel_pytorch.ops.rope.op import rope_op
from kernel_pytorch.ops.rope.reference import rope_reference

__all__ = ["Implementation", "Layout", "rope", "unsupported"]

Implementation = Literal["triton", "reference"]
Layout = Literal["bhsd", "bshd"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST = 32768


def unsupported(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Skip | None:
    """Return why the kernel does not run on these tensors; `None` where it does."""
    for tensor in (q, k, cos, sin):
        if tensor.dtype not in _DTYPES:
            return Skip(f"the kernel takes bfloat16, float16 and float32, got {tensor.dtype}")
    if cos.requires_grad or sin.requires_grad:
        return Skip("the kernel has no gradient of cos and sin", "detach them, or use impl='reference'")
    for tensor in (q, k):
        elements = max(tensor.shape[1], tensor.shape[2]) * tensor.shape[3]
        if min(tensor.shape[1], tensor.shape[2]) * tensor.shape[3] > _MOST:
            return Skip(f"the heads of one position do not fit in registers: {elements} elements, at most {_MOST}")
    return cannot_run(q, k, cos, sin)


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    layout: Layout = "bhsd",
    interleaved: bool = False,
    impl: Implementation | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn queries and keys by the angles of their positions, both in one pass over memory.

    Args:
        q: `[batch, heads, sequence, d]` or, for layout `bshd`, `[batch, sequence, heads, d]`; `d` even; bfloat16,
            float16 or float32 (the reference: any floating-point dtype). Any strides.
        k: The same, with its own number of heads.
        cos: `[sequence, d / 2]` or `[batch or 1, sequence, d / 2]`; or `d` wide, as Hugging Face's are, where pairs are
            not interleaved: `q * cos + rotate_half(q) * sin`.
        sin: Like `cos`.
        layout: `bhsd` or `bshd`.
        interleaved: Whether a pair is `(2 i, 2 i + 1)`, else `(i, i + d / 2)` as in Hugging Face's models.
        impl: `triton`, `reference`, or `None` for the kernel where it runs.

    Returns:
        The turned queries and keys, in the shapes, dtypes and memory order of the inputs; computed in float32.

    Raises:
        InputsError: Shapes or dtypes do not fit, or the kernel was asked for by name and does not run here.
    """
    if layout not in ("bhsd", "bshd"):
        raise InputsError(f"rope: unknown layout {layout!r}; expected 'bhsd' or 'bshd'")
    if impl not in (None, "triton", "reference"):
        raise InputsError(f"rope: unknown impl {impl!r}; expected 'triton', 'reference' or None")
    _check(q, k, cos, sin, position=2 if layout == "bhsd" else 1, interleaved=interleaved)
    skip = unsupported(q, k, cos, sin) if impl != "reference" else None
    if impl == "triton" and skip is not None:
        raise InputsError(f"rope: {skip.reason}", fix=skip.fix)
    if impl == "reference" or skip is not None:
        return rope_reference(q, k, cos, sin, layout=layout, interleaved=interleaved)
    turned: tuple[torch.Tensor, torch.Tensor] = rope_op(q, k, cos, sin, layout, interleaved, False)  # noqa: FBT003
    return turned


def _check(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, position: int, interleaved: bool
) -> None:
    batch, d = q.shape[0], q.shape[-1]
    fits = q.dim() == k.dim() == 4 and q.dtype == k.dtype and d % 2 == 0 and d > 0
    if not fits or any(q.shape[i] != k.shape[i] for i in (0, position, 3)):
        raise InputsError(
            "rope: q and k must be of one dtype and of four dimensions, alike but for their heads, with an even last "
            f"one; got {q.dtype} {[*q.shape]} and {k.dtype} {[*k.shape]}"
        )
    rows = (q.shape[position], d if cos.shape[-1:] == (d,) and not interleaved else d // 2)
    if cos.shape != sin.shape or tuple(cos.shape) not in (rows, (1, *rows), (batch, *rows)):
        raise InputsError(
            f"rope: cos and sin must be {[*rows]} or {[batch, *rows]}; got {[*cos.shape]} and {[*sin.shape]}"
        )
