"""Run and time on an AMD GPU, over `torch.cuda`, which is what torch's ROCm build calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from kernel_pytorch.backends import accelerator, lock, placement
from kernel_pytorch.backends.amd import telemetry
from kernel_pytorch.core.types import DeviceSpec
from kernel_pytorch.hardware import cache_bytes, detect
from kernel_pytorch.hardware.amd.probe import VERIFIED_ARCHES

__all__ = ["AmdHardwareManager"]


class AmdHardwareManager:
    """The manager of one GPU.

    Args:
        index: Index among the visible GPUs.
        flush_l2: Overwrite L2 and Infinity Cache before each timed run: right for single kernels.
    """

    vendor = "amd"

    def __init__(self, index: int = 0, *, flush_l2: bool = False) -> None:
        self._device = torch.device("cuda", index)
        self._scratch = accelerator.cache_flush(self._device, cache_bytes(self.spec)) if flush_l2 else None

    @property
    def spec(self) -> DeviceSpec:
        """The GPU, detected once a process."""
        return detect(f"amd:{self._device.index}")

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
        """Run `fn` once; milliseconds from an idle GPU to an idle GPU, the host's part included."""
        return accelerator.time_ms(torch.cuda, self._device, fn, self._scratch)

    def peak_bytes(self, fn: Callable[[], Any]) -> int | None:
        """Run `fn` once; bytes that torch's allocator handed out at most above what was held before."""
        return accelerator.peak_bytes(torch.cuda, self._device, fn)

    def telemetry(self) -> Mapping[str, float]:
        """Return clocks, power and temperature; without AMD SMI's package, none."""
        properties: Any = torch.cuda.get_device_properties(self._device)
        address = (int(getattr(properties, f"pci_{part}_id", -1)) for part in ("domain", "bus", "device"))
        return telemetry.read(*address)

    def exclusive(self) -> AbstractContextManager[None]:
        """Lock the GPU, by its own identity, for a measurement among processes of this package."""
        properties = torch.cuda.get_device_properties(self._device)
        return lock.exclusive(f"amd-{getattr(properties, 'uuid', self._device.index)}")
