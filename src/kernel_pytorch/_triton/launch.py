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
    "can_overlap",
    "cannot_run",
    "looping_launch",
    "multiprocessors",
    "next_power_of_2",
    "on_device_of",
    "resident_options",
    "shared_bytes",
    "tile_launch",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "") == "1"
"""Whether Triton's interpreter runs the kernels, on CPU tensors; Triton reads the variable at import, and so do we."""

_INSTALLED = importlib.util.find_spec("triton") is not None
_FEW_MULTIPROCESSORS = 3
_LITTLE_SHARED = 1 << 16
_REGISTERS = 1 << 16
"""Of a multiprocessor, on all NVIDIA GPUs that Triton supports."""
_LONG = 16384
_IN_FLIGHT = 60_000
"""Bytes of loads in flight on a multiprocessor, of loops over rows. H200, backward of RMSNorm in bfloat16, buffers (KB
in flight): 16384x4096 one (32) 0.134 ms, two (64) 0.1105, three (96) 0.1132; 8192x8192 one (32) 0.158, two (64) 0.1090,
three (96) 0.1103; 16384x5120 one (20) 0.253, two (40) 0.156, three (60) 0.140."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel over rows is launched.

    Attributes:
        rows: Rows a program works on at a time.
        warps: Warps a program.
        per_multiprocessor: Programs for each multiprocessor, of kernels whose programs loop over rows; 0 of others.
        stages: Stages of a loop over rows. Triton fills `stages - 1` buffers of shared memory, and asks for the next
            rows only after those at hand are worked on: with two stages nothing is in flight meanwhile.
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


@functools.cache
def _shared_bytes(index: int) -> int:
    found = torch.cuda.get_device_properties(index)
    # ROCm builds of PyTorch lack the first name; there a program may have all of it without asking.
    return int(getattr(found, "shared_memory_per_block_optin", None) or found.shared_memory_per_block)


def shared_bytes(device: torch.device) -> int:
    """Return the shared memory (LDS) that one program may have at most on a GPU; 64 KiB under the interpreter."""
    if device.type != "cuda":
        return _LITTLE_SHARED
    return _shared_bytes(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def can_overlap(device: torch.device) -> bool:
    """Return whether a kernel can be launched while the one before it ends: NVIDIA GPUs from sm_90 on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return _capability(device.index if device.index is not None else torch.cuda.current_device()) >= (9, 0)


def resident_options(launch: Launch, device: torch.device) -> dict[str, int]:
    """Return the compiler's options under which a multiprocessor has registers for all its programs at once.

    Left alone, the compiler takes up to 160 registers a thread for a loop that needs 128 for two programs of 8 warps.
    """
    if device.type != "cuda" or torch.version.hip is not None or launch.per_multiprocessor < 2:
        return {}
    return {"maxnreg": min(255, _REGISTERS // (32 * launch.warps * launch.per_multiprocessor))}


def _warps(elements: int, least: int) -> int:
    """Return the most warps, four at least, whose threads have `least` elements each."""
    return min(32, max(4, next_power_of_2(elements // (32 * least) + 1) // 2))


def tile_launch(columns: int) -> Launch:
    """Return the rows and warps of a program that works on one tile: at least 2,048 elements, 32 to 64 a thread.

    The warps go by the columns there are, not by the power of two above. H200, forward in bfloat16, warps, ms: RMSNorm
    16384x4096, 4 0.0708, 8 0.0706; 8192x8192, 8 0.0713, 16 0.0713; 16384x5120, 4 0.0863, 8 0.0855; 16384x14336, 8
    0.232, 16 0.242; with a residual 16384x4096, 4 0.1350, 8 0.1354; 8192x8192, 8 0.1357, 16 0.1351. LayerNorm
    16384x4096, 4 0.0714, 8 0.0707; 8192x8192, 8 0.0703, 16 0.0751; 16384x5120, 4 0.0865, 8 0.0978; 16384x768, two
    rows, 4 0.0192, 8 0.0254. Tiles of 8,192 elements: RMSNorm 16384x768 0.0188 beside 0.0183, 16384x2048 0.0402 beside
    0.0381.

    Loads have no hint that what they read is not read again (`evict_first`). With it, forward took 4 % longer at
    4,096 columns (16,384 rows) and 5,120, 5 % in LayerNorm and 1 % in RMSNorm at 8,192, and 1 to 2 % less at 768;
    backward took the same everywhere.
    """
    rows = max(1, min(16, 2048 // next_power_of_2(columns)))
    return Launch(rows=rows, warps=_warps(rows * columns, 32))


def looping_launch(columns: int, bytes_per_column: int, shared: int) -> Launch:
    """Return the launch of a kernel whose programs loop over rows: at least 60 KB in flight, in two or three buffers.

    A thread has 16 to 32 elements. H200, backward in bfloat16, warps, ms: RMSNorm 16384x4096, 8 0.1086, 16 0.1091;
    8192x8192, 16 0.1090, 8 (and three buffers) 0.1117; 16384x5120, 8 0.136, 16 0.140; 16384x14336, 16 0.559 and 0.597
    (two runs), 32 0.591 and 0.580. LayerNorm 16384x4096, 8 0.1088, 16 0.1187. Two programs at 5,120 columns took 0.145
    (LayerNorm 0.264) where one took 0.133 (0.135): their registers no longer suffice.

    Args:
        columns: Elements of a row.
        bytes_per_column: What the loop reads for each element of a row, of all tensors together.
        shared: Shared memory of one multiprocessor, in bytes; the programs on it divide it.
    """
    block = next_power_of_2(columns)
    rows = tile_launch(columns).rows
    warps = min(16 if block <= _LONG else 32, _warps(rows * columns, 16))
    programs = max(1, min(4, 8192 // (rows * block)))
    wanted = min(3, max(2, -(-_IN_FLIGHT // (programs * rows * columns * bytes_per_column))))
    fitting = max(0, (shared // programs - 2048) // (rows * block * bytes_per_column))
    return Launch(rows, warps, per_multiprocessor=programs, stages=min(wanted, fitting) + 1)


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Return a context in which launches go to the tensor's GPU (Triton launches on the current one)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Return `x` as a matrix of its last dimension, whose elements are adjacent; a view where the strides allow it."""
    columns = x.shape[-1]
    adjacent = x if columns == 1 or x.stride(-1) == 1 else x.contiguous()
    return adjacent.reshape(x.numel() // max(columns, 1), columns)
