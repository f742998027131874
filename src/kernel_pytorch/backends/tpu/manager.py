"""Run and time on one TPU, over whichever runtime is installed; or on its emulation, where times mean nothing."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from kernel_pytorch.backends import lock, placement
from kernel_pytorch.backends.cpu import memory
from kernel_pytorch.backends.tpu.runtimes import Runtime, load
from kernel_pytorch.core.types import DeviceSpec
from kernel_pytorch.hardware import detect

__all__ = ["TPUHardwareManager"]


class TPUHardwareManager:
    """The manager of one TPU device of this host.

    The runtime is loaded when something has to run, not before: a chip belongs to one process at a time, and a process
    that only asks what the device is must leave it to the workers.

    Args:
        index: Index among the visible devices.
    """

    vendor = "tpu"
    one_process = True
    """A second process cannot have the device while this one does."""

    def __init__(self, index: int = 0) -> None:
        self._index = index

    @property
    def runtime(self) -> Runtime:
        """The runtime, loaded at the first use in the process."""
        return load()

    @property
    def lazy(self) -> bool:
        """Whether work is recorded until the device is waited for: what is dropped before is never computed."""
        return self.runtime.name == "torch_xla"

    @property
    def spec(self) -> DeviceSpec:
        """The device, detected once a process and without its runtime."""
        return detect(f"tpu:{self._index}")

    @property
    def verified(self) -> bool:
        """Whether the contract suite has been run on a chip of this generation."""
        return self.spec.verified

    def place(self, tree: Any) -> Any:
        """Return a module or a tree of tensors on the device; the original stays where it is."""
        return placement.place(tree, self.runtime.device)

    def synchronize(self) -> None:
        """Wait until all work handed to the device has finished."""
        self.runtime.synchronize()

    def time_ms(self, fn: Callable[[], Any]) -> float:
        """Run `fn` once; wall milliseconds from an idle device to an idle device, compilation included."""
        self.runtime.synchronize()
        start = time.perf_counter_ns()
        self._run(fn)
        return (time.perf_counter_ns() - start) / 1e6

    def peak_bytes(self, fn: Callable[[], Any]) -> int | None:
        """Run `fn` once; bytes above what was held before. Emulated: of the process, whose memory the device is."""
        if self.runtime.emulated:
            self.runtime.synchronize()
            return memory.peak_bytes(lambda: self._run(fn))
        gc.collect()
        self.runtime.synchronize()
        self.runtime.reset_peak()
        before = self.runtime.memory()
        self._run(fn)
        after = self.runtime.memory()
        if before is None or after is None or not after.peak_bytes:
            return None
        return max(0, after.peak_bytes - before.held_bytes)

    def _run(self, fn: Callable[[], Any]) -> None:
        held = fn()  # PyTorch/XLA computes what is alive when it synchronises, and nothing else
        self.runtime.synchronize()
        del held

    def telemetry(self) -> Mapping[str, float]:
        """Return nothing: clocks and power of a TPU are read from its host's monitoring, not from a process."""
        return {}

    def exclusive(self) -> AbstractContextManager[None]:
        """Lock the device for a measurement among processes of this package."""
        return lock.exclusive("cpu" if self.spec.arch == "emulated" else f"tpu-{self._index}")
