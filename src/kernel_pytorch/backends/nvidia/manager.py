"""Run and time on an NVIDIA GPU: CUDA events within wall time, the caching allocator's peak, NVML's telemetry."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from kernel_pytorch.backends import lock, placement
from kernel_pytorch.backends.nvidia import telemetry
from kernel_pytorch.core.types import DeviceSpec
from kernel_pytorch.hardware import cache_bytes, detect
from kernel_pytorch.hardware.nvidia.probe import VERIFIED_ARCHES

__all__ = ["NvidiaHardwareManager"]


class NvidiaHardwareManager:
    """The manager of one GPU.

    Args:
        index: Index among the visible GPUs.
        flush_l2: Overwrite the L2 cache before each timed run: right for single kernels, whose inputs would
            otherwise lie in it; a whole model evicts it itself.
    """

    vendor = "nvidia"

    def __init__(self, index: int = 0, *, flush_l2: bool = False) -> None:
        self._device = torch.device("cuda", index)
        self._scratch: torch.Tensor | None = None
        if flush_l2:
            size = max(2 * cache_bytes(self.spec), 64 << 20)
            self._scratch = torch.empty(size, dtype=torch.int8, device=self._device)

    @property
    def spec(self) -> DeviceSpec:
        """The GPU, detected once a process."""
        return detect(f"cuda:{self._device.index}")

    @property
    def verified(self) -> bool:
        """Whether the contract suite has been run on hardware of this arch."""
        return self.spec.arch in VERIFIED_ARCHES

    def place(self, tree: Any) -> Any:
        """Return a module or a tree of tensors on the GPU; the original stays where it is."""
        return placement.place(tree, self._device)

    def synchronize(self) -> None:
        """Wait until all work queued on the GPU has finished."""
        torch.cuda.synchronize(self._device)

    def time_ms(self, fn: Callable[[], Any]) -> float:
        """Run `fn` once and return its time in milliseconds from an idle GPU to an idle GPU.

        The longer of the events' time and the wall time: events alone miss what the host does before the first
        launch, and wall time alone cannot be shorter than they are.
        """
        with torch.cuda.device(self._device):
            if self._scratch is not None:
                self._scratch.zero_()
            event: Any = torch.cuda.Event
            begin, end = event(enable_timing=True), event(enable_timing=True)
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            begin.record()
            fn()
            end.record()
            torch.cuda.synchronize()
            wall_ms = (time.perf_counter_ns() - start) / 1e6
            return max(wall_ms, float(begin.elapsed_time(end)))

    def peak_bytes(self, fn: Callable[[], Any]) -> int | None:
        """Run `fn` once and return the most memory that torch's allocator handed out above what was held before.

        Memory that libraries take by themselves (cuBLAS outside torch's workspaces, NCCL) is not in it.
        """
        gc.collect()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        fn()
        self.synchronize()
        return max(0, int(torch.cuda.max_memory_allocated(self._device)) - before)

    def telemetry(self) -> Mapping[str, float]:
        """Return clocks, power, temperature and throttle reasons; without NVML, or its permission, fewer or none."""
        return telemetry.read(str(torch.cuda.get_device_properties(self._device).uuid))

    def exclusive(self) -> AbstractContextManager[None]:
        """Lock the GPU, by its own identity, for a measurement among processes of this package."""
        return lock.exclusive(f"nvidia-{torch.cuda.get_device_properties(self._device).uuid}")
