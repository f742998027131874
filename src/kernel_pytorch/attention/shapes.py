"""Shapes that tests, probes on hardware and the benchmark share: ordinary ones, and awkward ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kernel_pytorch.attention.types import AttentionShape

__all__ = ["AWKWARD", "GRID", "SHAPES", "NamedShape", "small"]


@dataclass(frozen=True, slots=True)
class NamedShape:
    """A shape with what a test calls it.

    Attributes:
        name: Unique.
        shape: What to compute.
        strided: Whether query, key and value are views that no kernel reads in place (an odd row stride).
    """

    name: str
    shape: AttentionShape
    strided: bool = False


def _square(batch: int, heads: int, kv_heads: int, tokens: int, size: int, *, causal: bool) -> AttentionShape:
    return AttentionShape(batch, heads, kv_heads, tokens, tokens, size, torch.bfloat16, is_causal=causal)


def _grid() -> tuple[NamedShape, ...]:
    """Lengths from 512 to 32k, 8192 tokens in all where they are that short, 2048 channels or (32k) half as many.

    Heads of 128, which most models have, at twice as many lengths.
    """
    shapes = []
    for tokens in (512, 2048, 4096, 8192, 16384, 32768):
        batch = max(1, 8192 // tokens)
        for size in (128,) if tokens in (4096, 16384) else (64, 128, 256):
            heads = (2048 if tokens < 32768 else 1024) // size
            for kv_heads in (heads, heads // 4):
                for causal in (True, False):
                    name = f"s{tokens} d{size} {'mha' if kv_heads == heads else 'gqa'} {'causal' if causal else 'full'}"
                    shapes.append(NamedShape(name, _square(batch, heads, kv_heads, tokens, size, causal=causal)))
    return tuple(shapes)


GRID: tuple[NamedShape, ...] = _grid()
"""Lengths, head sizes, grouped and ungrouped, causal and full."""

AWKWARD: tuple[NamedShape, ...] = (
    NamedShape("batch 3, 3000 tokens, heads of 80", _square(3, 12, 12, 3000, 80, causal=True)),
    NamedShape("the same, full", _square(3, 12, 12, 3000, 80, causal=False)),
    NamedShape("batch 3, 3000 tokens, 5 groups", _square(3, 20, 4, 3000, 128, causal=True)),
    NamedShape("one token on a cache", AttentionShape(4, 32, 8, 1, 3000, 128, is_causal=True, alignment="lower_right")),
    NamedShape("a chunk on a cache", AttentionShape(2, 16, 16, 257, 2049, 64, is_causal=True, alignment="lower_right")),
    NamedShape("more queries than keys, full", AttentionShape(2, 8, 8, 1000, 300, 64)),
    NamedShape("more keys than queries, upper left", AttentionShape(2, 8, 8, 300, 1000, 64, is_causal=True)),
    NamedShape("more queries than keys, upper left", AttentionShape(2, 8, 8, 1000, 300, 64, is_causal=True)),
    NamedShape("sliding window", AttentionShape(1, 16, 4, 2048, 2048, 128, is_causal=True, window=(255, 0))),
    NamedShape(
        "two-sided window, cross", AttentionShape(1, 8, 8, 600, 900, 64, window=(100, 50), alignment="lower_right")
    ),
    NamedShape("softcap", replace(_square(1, 16, 8, 2048, 128, causal=True), softcap=30.0)),
    NamedShape("odd heads of 72, half precision", AttentionShape(1, 7, 7, 333, 333, 72, torch.float16, is_causal=True)),
    NamedShape("strided", _square(2, 8, 2, 384, 64, causal=True), strided=True),
    NamedShape("documents", replace(_square(5, 16, 16, 700, 128, causal=True), packed=True, alignment="lower_right")),
)
"""What goes wrong first: odd sizes, few queries, unequal lengths, groups, windows, strides, packed documents."""

SHAPES: tuple[NamedShape, ...] = (*GRID, *AWKWARD)


def small(named: NamedShape, dtype: torch.dtype = torch.float32) -> NamedShape:
    """Return a shape of the same kind that a CPU computes in a millisecond."""
    shape = named.shape
    shrink = max(1, max(shape.q_len, shape.kv_len) // 48)
    left, right = (None if w is None else -(-w // shrink) for w in shape.window or (None, None))
    groups = shape.heads // shape.kv_heads
    kv_heads = min(2, shape.kv_heads)
    return replace(
        named,
        shape=replace(
            shape,
            batch=min(2, shape.batch),
            heads=kv_heads * groups,
            kv_heads=kv_heads,
            q_len=-(-shape.q_len // shrink),
            kv_len=-(-shape.kv_len // shrink),
            head_dim=max(8, shape.head_dim // 8),
            dtype=dtype,
            window=None if shape.window is None else (left, right),
        ),
    )
