# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, operator"
# ruff: noqa: ANN001, ANN202, N803, PLR0917
"""Triton kernel of rotary position embedding: one program turns all heads of one position, of queries and keys.

Least traffic: queries and keys read once and written once; the angles of a position are read once for all heads. The
backward is the same kernel with the transposed rotation, so nothing but the angles is kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernel_pytorch._triton.launch import next_power_of_2, on_device_of
from kernel_pytorch._triton.targets import CompileCase

__all__ = ["COMPILE_CASES", "rotate", "warps_for"]


@triton.jit
def _load_pairs(x, stride, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return the first and second elements of the pairs of all heads, `[HEADS, HALF]` each, in fp32."""
    head = tl.arange(0, HEADS)
    row = x + head.to(tl.int64)[:, None] * stride
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)
        mask = (head < heads)[:, None] & (column < 2 * half)[None, :]
        both = tl.load(row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, [HEADS, HALF, 2]))
    else:
        column = tl.arange(0, HALF)
        mask = (head < heads)[:, None] & (column < half)[None, :]
        first = tl.load(row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        second = tl.load(row + half + column[None, :], mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_pairs(
    x, first, second, stride, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    head = tl.arange(0, HEADS)
    row = x + head.to(tl.int64)[:, None] * stride
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)
        mask = (head < heads)[:, None] & (column < 2 * half)[None, :]
        both = tl.reshape(tl.join(first, second), [HEADS, 2 * HALF])
        tl.store(row + column[None, :], both.to(x.dtype.element_ty), mask=mask)
    else:
        column = tl.arange(0, HALF)
        mask = (head < heads)[:, None] & (column < half)[None, :]
        tl.store(row + column[None, :], first.to(x.dtype.element_ty), mask=mask)
        tl.store(row + half + column[None, :], second.to(x.dtype.element_ty), mask=mask)


@triton.jit
def rope_kernel(
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    q_batch,
    q_position,
    q_head,
    k_batch,
    k_position,
    k_head,
    q_out_batch,
    q_out_position,
    q_out_head,
    k_out_batch,
    k_out_position,
    k_out_head,
    cos_batch,
    cos_position,
    sin_batch,
    sin_position,
    positions,
    q_heads,
    k_heads,
    half,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
    INVERSE: tl.constexpr,
):
    program = tl.program_id(0)
    batch = (program // positions).to(tl.int64)
    position = (program % positions).to(tl.int64)
    column = tl.arange(0, HALF)
    at_cos = cos + batch * cos_batch + position * cos_position + column
    at_sin = sin + batch * sin_batch + position * sin_position + column
    c = tl.load(at_cos, mask=column < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(at_sin, mask=column < half, other=0.0).to(tl.float32)[None, :]
    c_second, s_second = c, s
    if WIDE:
        c_second = tl.load(at_cos + half, mask=column < half, other=0.0).to(tl.float32)[None, :]
        s_second = tl.load(at_sin + half, mask=column < half, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        s, s_second = -s_second, -s
    # All loads come before the first store, for the compiler does not move them over one.
    q_at, k_at = q + batch * q_batch + position * q_position, k + batch * k_batch + position * k_position
    q_first, q_second = _load_pairs(q_at, q_head, q_heads, half, Q_HEADS, HALF, INTERLEAVED)
    k_first, k_second = _load_pairs(k_at, k_head, k_heads, half, K_HEADS, HALF, INTERLEAVED)
    q_to = q_out + batch * q_out_batch + position * q_out_position
    k_to = k_out + batch * k_out_batch + position * k_out_position
    _store_pairs(
        q_to,
        q_first * c - q_second * s,
        q_second * c_second + q_first * s_second,
        q_out_head,
        q_heads,
        half,
        Q_HEADS,
        HALF,
        INTERLEAVED,
    )
    _store_pairs(
        k_to,
        k_first * c - k_second * s,
        k_second * c_second + k_first * s_second,
        k_out_head,
        k_heads,
        half,
        K_HEADS,
        HALF,
        INTERLEAVED,
    )


def warps_for(heads: int, half: int) -> int:
    """Return the warps of a program for so many query heads: 32 elements a thread."""
    return min(16, max(1, next_power_of_2(heads) * next_power_of_2(half) * 2 // 1024))


def _strides(x: torch.Tensor, layout: str) -> tuple[int, int, int]:
    """Return the strides of batch, position and head."""
    position, head = (2, 1) if layout == "bhsd" else (1, 2)
    return x.stride(0), x.stride(position), x.stride(head)


def _angles(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """Return cos or sin with adjacent elements, and its strides of batch (0 where all share) and position."""
    adjacent = x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()
    shared = adjacent.dim() == 2 or adjacent.shape[0] == 1
    return adjacent, 0 if shared else adjacent.stride(0), adjacent.stride(-2)


def rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    layout: str,
    interleaved: bool,
    inverse: bool,
    warps: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and keys, turned; in the memory order of the inputs where they are dense."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    batches, positions = q.shape[0], q.shape[2 if layout == "bhsd" else 1]
    q_heads, k_heads = (x.shape[1 if layout == "bhsd" else 2] for x in (q, k))
    half = q.shape[-1] // 2
    if batches * positions == 0:
        return q_out, k_out
    cos, *cos_strides = _angles(cos)
    sin, *sin_strides = _angles(sin)
    with on_device_of(q):
        rope_kernel[(batches * positions,)](
            q,
            k,
            q_out,
            k_out,
            cos,
            sin,
            *_strides(q, layout),
            *_strides(k, layout),
            *_strides(q_out, layout),
            *_strides(k_out, layout),
            *cos_strides,
            *sin_strides,
            positions,
            q_heads,
            k_heads,
            half,
            Q_HEADS=next_power_of_2(q_heads),
            K_HEADS=next_power_of_2(k_heads),
            HALF=next_power_of_2(half),
            INTERLEAVED=interleaved,
            WIDE=cos.shape[-1] == 2 * half,
            INVERSE=inverse,
            num_warps=warps or warps_for(q_heads, half),
            enable_fp_fusion=True,
        )
    return q_out, k_out


def _case(kind: str, heads: int, half: int, *, interleaved: bool, wide: bool = False) -> CompileCase:
    pointers = dict.fromkeys(("q", "k", "q_out", "k_out"), f"*{kind}") | dict.fromkeys(("cos", "sin"), "*fp32")
    places = ("batch", "position", "head")
    strides = [f"{x}_{place}" for x in ("q", "k", "q_out", "k_out") for place in places]
    strides += ["cos_batch", "cos_position", "sin_batch", "sin_position"]
    signature = pointers | dict.fromkeys((*strides, "positions", "q_heads", "k_heads", "half"), "i32")
    constants = {"Q_HEADS": heads, "K_HEADS": heads // 4, "HALF": half, "INTERLEAVED": interleaved}
    constants["WIDE"] = wide
    label = f"{kind}-{'interleaved' if interleaved else 'halves'}{'-wide' if wide else ''}"
    return CompileCase(
        rope_kernel, signature, constants | {"INVERSE": interleaved}, warps_for(heads, half), label=label
    )


COMPILE_CASES = [
    _case("bf16", 32, 64, interleaved=False),
    _case("bf16", 32, 64, interleaved=False, wide=True),
    _case("fp16", 32, 64, interleaved=True),
    _case("fp32", 64, 128, interleaved=False),
]
