"""Where Triton kernels run, the shape of a launch, and tensors as rows."""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from kernel_pytorch.core.types import Skip

__all__ = [
    "INTERPRETED",
    "Launch",
    "as_rows",
    "cannot_run",
    "multiprocessors",
    "next_power_of_2",
    "on_device_of",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "") == "1"
"""Whether Triton's interpreter runs the kernels, on CPU tensors; Triton reads the variable at import, and so do we."""

_INSTALLED = importlib.util.find_spec("triton") is not None
_FEW_MULTIPROCESSORS = 3


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel over rows is launched.

    Attributes:
        rows: Rows a program works on at a time.
        warps: Warps a program.
        per_multiprocessor: Programs for each multiprocessor, of kernels whose programs loop over rows; 0 of others.
        stages: Rows in flight in a loop: more than one prefetches through shared memory.
    """

    rows: int
    warps: int
    per_multiprocessor: int = 0
    stages: int = 1


def cannot_run(*tensors: torch.Tensor | None) -> Skip | None:
    """Return why Triton kernels cannot run on these tensors; `None` where they can. Does not import triton."""
    if not _INSTALLED:
        return Skip("triton is not installed", "pip install triton")
    wanted = "cpu" if INTERPRETED else "cuda"
    for tensor in tensors:
        if tensor is not None and tensor.device.type != wanted:
            return Skip(f"Triton kernels run on {wanted} tensors here, got one on {tensor.device.type}")
    return None


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is at least `n` and at least 1."""
    return 1 << max(0, n - 1).bit_length()


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors (compute units) of a GPU.

    Under the interpreter it is three: more than one and odd, so that tests see uneven shares of the rows.
    """
    if device.type != "cuda":
        return _FEW_MULTIPROCESSORS
    return _multiprocessors(device.index if device.index is not None else torch.cuda.current_device())


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Return a context in which launches go to the tensor's GPU (Triton launches on the current one)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Return `x` as a matrix of its last dimension, whose elements are adjacent; a view where the strides allow it."""
    columns = x.shape[-1]
    adjacent = x if columns == 1 or x.stride(-1) == 1 else x.contiguous()
    return adjacent.reshape(x.numel() // max(columns, 1), columns)
