"""Time and memory on an accelerator, over the interface that torch gives each of them: `torch.cuda`, `torch.xpu`."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["cache_flush", "peak_bytes", "time_ms"]

_LEAST_FLUSH_BYTES = 64 << 20


def cache_flush(device: torch.device, cache_bytes: int) -> torch.Tensor:
    """Return memory that, when it is overwritten, leaves nothing else in a cache of so many bytes."""
    return torch.empty(max(2 * cache_bytes, _LEAST_FLUSH_BYTES), dtype=torch.int8, device=device)


def time_ms(api: Any, device: torch.device, fn: Callable[[], Any], flush: torch.Tensor | None = None) -> float:
    """Run `fn` once and return its time in milliseconds from an idle device to an idle device.

    The longer of the events' time and the wall time: events alone miss what the host does before the first launch,
    and wall time alone cannot be shorter than they are.

    Args:
        api: The torch module of the device: `torch.cuda`, `torch.xpu`.
        device: The device; made current meanwhile.
        fn: The work.
        flush: Overwritten first, untimed (`cache_flush`).
    """
    with api.device(device):
        if flush is not None:
            flush.zero_()
        begin, end = api.Event(enable_timing=True), api.Event(enable_timing=True)
        api.synchronize()
        start = time.perf_counter_ns()
        begin.record()
        fn()
        end.record()
        api.synchronize()
        wall_ms = (time.perf_counter_ns() - start) / 1e6
        return max(wall_ms, float(begin.elapsed_time(end)))


def peak_bytes(api: Any, device: torch.device, fn: Callable[[], Any]) -> int:
    """Run `fn` once and return the most memory that torch's allocator handed out above what was held before.

    Memory that libraries take by themselves (BLAS outside torch's workspaces, collectives) is not in it.
    """
    gc.collect()
    api.synchronize(device)
    api.reset_peak_memory_stats(device)
    before = int(api.memory_allocated(device))
    fn()
    api.synchronize(device)
    return max(0, int(api.max_memory_allocated(device)) - before)
