"""Shapes of `gate` and `up` for tests and benchmarks."""

from __future__ import annotations

__all__ = ["AWKWARD", "SHAPES"]

SHAPES: tuple[tuple[int, int], ...] = ((16384, 14336), (8192, 28672), (2048, 3072))
"""`(tokens, intermediate)` of training: Llama-3-8B, Llama-3-70B, BERT-base."""

AWKWARD: tuple[tuple[int, ...], ...] = ((1, 1), (1, 64), (7, 33), (2, 3, 100), (0, 16), (3, 4099), (5, 2048))
"""One element, one row, odd sizes, three dimensions, no rows, rows longer than one program's share."""
