"""Formats of 8 bits, the sizes that products of them take, and the state of a delayed scale."""

from __future__ import annotations

import torch

__all__ = ["ALIGNED", "E4M3", "E5M2", "FORMATS", "HISTORY_AT", "fresh_state", "padded", "whole_shape"]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = {"e4m3": E4M3, "e5m2": E5M2}
ALIGNED = 16
"""Elements: products of FP8 take inner dimensions and leading dimensions of multiples of 16 bytes."""
HISTORY_AT = 3


def padded(n: int) -> int:
    """Return the least multiple of 16 that is at least `n`."""
    return -(-n // ALIGNED) * ALIGNED


def whole_shape(xs: list[torch.Tensor], axis: int) -> tuple[int, int]:
    """Return rows and columns of matrices that are put below each other (axis 0) or side by side (axis 1)."""
    rows, columns = ([x.shape[i] for x in xs] for i in (0, 1))
    return (sum(rows), columns[0]) if axis == 0 else (rows[0], sum(columns))


def fresh_state(history: int, device: torch.device | str) -> torch.Tensor:
    """Return the state of a scale of which nothing is known yet.

    Float32 `[3 + history]`: the place in the history that comes next, the amax since the last update, the scale (0:
    unknown), then the history as a ring.

    Args:
        history: Casts whose largest magnitude decides the scale; a power of two.
        device: Where the tensors are that it is for.
    """
    if history < 1 or history & (history - 1):
        raise ValueError(f"history must be a power of two, got {history}")
    return torch.zeros(HISTORY_AT + history, dtype=torch.float32, device=device)
