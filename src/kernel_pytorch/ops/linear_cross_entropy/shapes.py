"""Shapes shared by tests and benchmarks: rows, hidden size, vocabulary."""

from __future__ import annotations

__all__ = ["AWKWARD", "LLAMA_3"]

AWKWARD: tuple[tuple[int, int, int], ...] = ((1, 8, 5), (7, 16, 257), (0, 8, 32), (33, 24, 1024), (12, 8, 5000))
"""One row, sizes that no block divides, no row, and vocabularies of exactly and of more than one tile."""
LLAMA_3: tuple[int, int, int] = (8192, 4096, 128256)
