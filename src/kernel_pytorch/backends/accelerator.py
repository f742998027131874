"""Placement, time and memory on an accelerator, as torch offers them for each kind: `torch.cuda`, `torch.xpu`."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch

from kernel_pytorch.backends import lock, placement
from kernel_pytorch.core.types import DeviceSpec
from kernel_pytorch.hardware import cache_bytes, detect

__all__ = ["Accelerator", "cache_flush", "peak_bytes", "time_ms"]

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


class Accelerator:
    """One device of `torch.cuda` or `torch.xpu`: all of a `HardwareManager` but the telemetry, which a vendor adds.

    Args:
        index: Index among the visible devices.
        flush_l2: Overwrite the last-level cache before each timed run: right for single kernels, whose inputs would
            otherwise lie in it; a whole model evicts it itself.
    """

    vendor: ClassVar[str]
    torch_type: ClassVar[str]
    """What torch calls the vendor's devices."""

    def __init__(self, index: int = 0, *, flush_l2: bool = False) -> None:
        self._device = torch.device(self.torch_type, index)
        self._api: Any = getattr(torch, self.torch_type)
        self._scratch = cache_flush(self._device, cache_bytes(self.spec)) if flush_l2 else None

    @property
    def spec(self) -> DeviceSpec:
        """The device, detected once a process."""
        return detect(f"{self.vendor}:{self._device.index}")

    @property
    def verified(self) -> bool:
        """Whether the contract suite has been run on hardware of this arch."""
        return self.spec.verified

    def place(self, tree: Any) -> Any:
        """Return a module or a tree of tensors on the device; the original stays where it is."""
        return placement.place(tree, self._device)

    def synchronize(self) -> None:
        """Wait until all work queued on the device has finished."""
        self._api.synchronize(self._device)

    def time_ms(self, fn: Callable[[], Any]) -> float:
        """Run `fn` once; milliseconds from an idle device to an idle device, the host's part included.

        See the function `time_ms`.
        """
        return time_ms(self._api, self._device, fn, self._scratch)

    def peak_bytes(self, fn: Callable[[], Any]) -> int | None:
        """Run `fn` once; bytes that torch's allocator handed out at most above what was held before."""
        return peak_bytes(self._api, self._device, fn)

    def exclusive(self) -> AbstractContextManager[None]:
        """Lock the device, by its own identity, for a measurement among processes of this package."""
        return lock.exclusive(f"{self.vendor}-{self._uuid()}")

    def _uuid(self) -> str:
        return str(getattr(self._api.get_device_properties(self._device), "uuid", self._device.index))
