"""Shapes `(rows, columns)` for tests and benchmarks."""

from __future__ import annotations

__all__ = ["AWKWARD", "SHAPES"]

SHAPES: tuple[tuple[int, int], ...] = ((16384, 4096), (16384, 14336), (14336, 4096), (4096, 4096), (1024, 4096))
"""Activations, gradients and weights of Llama-3-8B's training at 4 x 4,096 tokens."""

AWKWARD: tuple[tuple[int, int], ...] = ((1, 16), (5, 33), (130, 72), (256, 128), (3, 300), (0, 16))
"""One row, odd sizes, tiles that end inside, whole tiles, few long rows, nothing."""
