"""Shapes `(tokens, in_features, out_features)` for tests and benchmarks."""

from __future__ import annotations

__all__ = ["AWKWARD", "SHAPES"]

SHAPES: tuple[tuple[int, int, int], ...] = (
    (16384, 4096, 4096),
    (16384, 4096, 1024),
    (16384, 4096, 14336),
    (16384, 14336, 4096),
    (16384, 4096, 128256),
)
"""Training: the products of Llama-3-8B at 4 x 4,096 tokens."""

AWKWARD: tuple[tuple[int, int, int], ...] = (
    (1, 8, 8),
    (3, 4096, 4096),
    (5, 72, 40),
    (1000, 770, 514),
    (0, 8, 16),
)
"""One row, few rows, leading dimensions that 16 bytes do not divide, and nothing."""
