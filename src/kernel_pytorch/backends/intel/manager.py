"""Run and time on an Intel GPU, over `torch.xpu`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from kernel_pytorch.backends import accelerator, lock, placement
from kernel_pytorch.core.types import DeviceSpec
from kernel_pytorch.hardware import cache_bytes, detect
from kernel_pytorch.hardware.intel.probe import VERIFIED_ARCHES

__all__ = ["IntelHardwareManager"]


class IntelHardwareManager:
    """The manager of one GPU, or of one tile where the driver shows tiles as devices.

    Args:
        index: Index among the visible devices.
        flush_l2: Overwrite the last-level cache before each timed run: right for single kernels.
    """

    vendor = "intel"

    def __init__(self, index: int = 0, *, flush_l2: bool = False) -> None:
        self._device = torch.device("xpu", index)
        self._scratch = accelerator.cache_flush(self._device, cache_bytes(self.spec)) if flush_l2 else None

    @property
    def spec(self) -> DeviceSpec:
        """The GPU, detected once a process."""
        return detect(f"intel:{self._device.index}")

    @property
    def verified(self) -> bool:
        """Whether the contract suite has been run on hardware of this arch."""
        return self.spec.arch in VERIFIED_ARCHES

    def place(self, tree: Any) -> Any:
        """Return a module or a tree of tensors on the GPU; the original stays where it is."""
        return placement.place(tree, self._device)

    def synchronize(self) -> None:
        """Wait until all work queued on the GPU has finished."""
        torch.xpu.synchronize(self._device)

    def time_ms(self, fn: Callable[[], Any]) -> float:
        """Run `fn` once; milliseconds from an idle GPU to an idle GPU, the host's part included."""
        return accelerator.time_ms(torch.xpu, self._device, fn, self._scratch)

    def peak_bytes(self, fn: Callable[[], Any]) -> int | None:
        """Run `fn` once; bytes that torch's allocator handed out at most above what was held before."""
        return accelerator.peak_bytes(torch.xpu, self._device, fn)

    def telemetry(self) -> Mapping[str, float]:
        """Return nothing: torch tells none, and Level Zero's Sysman has no Python package to ask."""
        return {}

    def exclusive(self) -> AbstractContextManager[None]:
        """Lock the GPU, by its own identity, for a measurement among processes of this package."""
        properties = torch.xpu.get_device_properties(self._device)
        return lock.exclusive(f"intel-{getattr(properties, 'uuid', self._device.index)}")
