# mypy: disable-error-code="no-untyped-call"
"""A mark on activations: their rows (the batch) lie spread over all devices, forward and backward.

A partitioner that may choose gathers activations as soon as weights are sharded (fully sharded data parallelism); the
mark tells it to gather the weights instead. It is written as a barrier of one tensor, which no other step writes, and
`backends.tpu.sharding` turns it into the compiler's own annotation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from kernel_pytorch.advanced_memory.barrier import hold_apart

__all__ = ["marked", "spread_rows"]


def spread_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor `[rows, ...]`, it and its gradient marked as spread over all devices by rows."""
    spread: torch.Tensor = _SpreadRows.apply(tensor)
    return spread


class _SpreadRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        del ctx
        return hold_apart([tensor])[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        del ctx
        return hold_apart([grad])[0]


def marked(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a call whose floating-point inputs and outputs of two or more dimensions are marked."""

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(_mark, (args, kwargs))
        return pytree.tree_map(_mark, call(*args, **kwargs))

    return run


def _mark(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dim() >= 2:
        return spread_rows(leaf)
    return leaf
