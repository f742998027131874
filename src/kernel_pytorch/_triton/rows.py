# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN202, N803, PLR0917
"""What kernels over rows share: rows as tiles."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["keep", "load_rows"]


@triton.jit
def load_rows(x, row, stride, column, rows, COLUMNS: tl.constexpr):
    """Return rows `row` of a matrix as a tile, zero outside of it."""
    mask = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    return tl.load(x + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def keep(tile, column, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Return a tile with zeros in columns that do not exist.

    They are zero already where this is used; but the compiler does not know what a load leaves out, and would compute
    3,072 columns in vain for rows of 5,120. `COLUMNS` is a constant for the same reason.
    """
    if COLUMNS == BLOCK:
        return tile
    return tl.where((column < COLUMNS)[None, :], tile, 0.0)
