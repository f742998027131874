"""What torch leaves undone where a CUDA-graph capture fails, done."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

__all__ = ["end_failed_capture"]


def end_failed_capture(device: torch.device, pool: Any, stream: torch.cuda.Stream) -> None:
    """Take allocator and default generator out of the state that a failed capture leaves them in.

    `CUDAGraph.capture_end` (torch 2.11) raises before it ends the allocation to the pool and before the generator's
    epilogue, so that every later random number of the process fails with "Offset increment outside graph capture
    encountered unexpectedly". A capture that succeeds runs the epilogue. Call it after leaving `torch.cuda.graph`.

    Args:
        device: Where the capture was.
        pool: What it allocated from (`torch.cuda.graph_pool_handle()`); not to be used again.
        stream: The stream to capture on.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with suppress(RuntimeError):  # the pool was left already
        torch._C._cuda_endAllocateToPool(index, pool)  # noqa: SLF001
        torch._C._cuda_releasePool(index, pool)  # noqa: SLF001
    scratch = torch.zeros(1, device=device)
    with torch.cuda.device(device), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        scratch.add_(1)
