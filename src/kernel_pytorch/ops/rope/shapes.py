"""Shapes `(batch, query heads, key heads, sequence, head_dim)` for tests and benchmarks."""

from __future__ import annotations

__all__ = ["AWKWARD", "SHAPES"]

SHAPES: tuple[tuple[int, int, int, int, int], ...] = (
    (4, 32, 8, 4096, 128),
    (1, 64, 8, 8192, 128),
    (16, 12, 12, 128, 64),
)
"""Training: Llama-3-8B, Llama-3-70B, and a small model."""

AWKWARD: tuple[tuple[int, int, int, int, int], ...] = (
    (1, 1, 1, 1, 2),
    (2, 3, 1, 5, 8),
    (1, 5, 5, 7, 80),
    (2, 8, 2, 3, 64),
    (0, 4, 4, 3, 8),
    (2, 4, 4, 0, 8),
)
"""One element a half, odd numbers of heads, head dimensions that are no power of two, and nothing."""
