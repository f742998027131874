"""Where Triton kernels run, and the sizes a launch needs."""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from kernel_pytorch.core.types import Skip

__all__ = ["cannot_run", "interpreted", "multiprocessors", "next_power_of_2", "on_device_of"]

INTERPRETED_MULTIPROCESSORS = 3
"""What `multiprocessors` says under the interpreter: more than one and odd, so that tests see uneven shares."""


def interpreted() -> bool:
    """Return whether Triton's interpreter (`TRITON_INTERPRET=1`) runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def cannot_run(*tensors: torch.Tensor | None) -> Skip | None:
    """Return why Triton kernels cannot run on these tensors; `None` where they can. Does not import triton."""
    if not _installed():
        return Skip("triton is not installed", "pip install triton")
    kinds = {tensor.device.type for tensor in tensors if tensor is not None}
    wanted = "cpu" if interpreted() else "cuda"
    if kinds <= {wanted}:
        return None
    return Skip(f"Triton kernels run on {wanted} tensors here, got {', '.join(sorted(kinds))}")


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is at least `n` and at least 1."""
    return 1 << max(0, n - 1).bit_length()


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors (compute units) of a GPU; a small odd number under the interpreter."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return _multiprocessors(device.index if device.index is not None else torch.cuda.current_device())


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Return a context in which launches go to the tensor's GPU (Triton launches on the current one)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
