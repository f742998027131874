"""Shapes of `x` for tests and benchmarks."""

from __future__ import annotations

__all__ = ["AWKWARD", "SHAPES"]

SHAPES: tuple[tuple[int, int], ...] = ((16384, 4096), (8192, 8192), (2048, 768))
"""`(tokens, hidden)` of training: Llama-3-8B, Llama-3-70B, BERT-base."""

AWKWARD: tuple[tuple[int, ...], ...] = (
    (1, 64),
    (7, 3),
    (5, 33),
    (2, 3, 100),
    (37, 257),
    (0, 16),
    (3, 4099),
    (9, 2048),
    (4, 9001),
    (2, 17001),
)
"""One row, short rows, odd sizes, three dimensions, no rows, and rows around the sizes where the launch changes."""
