"""Run and time on a CPU: wall time, resident memory, load of others."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import psutil
import torch

from kernel_pytorch.backends import lock, placement
from kernel_pytorch.backends.cpu import memory
from kernel_pytorch.core.types import DeviceSpec
from kernel_pytorch.hardware import detect

__all__ = ["CpuHardwareManager"]


class CpuHardwareManager:
    """The manager of the machine's CPU."""

    vendor = "cpu"
    verified = True

    def __init__(self, index: int = 0) -> None:
        self._index = index
        self._last = _CpuSeconds.now()

    @property
    def spec(self) -> DeviceSpec:
        """The CPU, detected once a process."""
        return detect(f"cpu:{self._index}")

    def place(self, tree: Any) -> Any:
        """Return a module or a tree of tensors in main memory; what is there already, as it is."""
        return placement.place(tree, torch.device("cpu"))

    def synchronize(self) -> None:
        """Return at once: a CPU operator has finished when its call returns."""

    def time_ms(self, fn: Callable[[], Any]) -> float:
        """Run `fn` once and return its wall time in milliseconds."""
        start = time.perf_counter_ns()
        fn()
        return (time.perf_counter_ns() - start) / 1e6

    def peak_bytes(self, fn: Callable[[], Any]) -> int | None:
        """Run `fn` once and return how far resident memory rose above what was held before."""
        return memory.peak_bytes(fn)

    def telemetry(self) -> Mapping[str, float]:
        """Return load and clock; CPU time taken by others is counted since the call before."""
        values = {"load_1min": os.getloadavg()[0]}
        frequency = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
        if frequency is not None and frequency.current:
            values["clock_mhz"] = float(frequency.current)
        now = _CpuSeconds.now()
        wall = (now.wall - self._last.wall) * now.cpus
        if wall > 0:
            others = now.busy - self._last.busy - (now.own - self._last.own)
            values["cpu_others_percent"] = min(100.0, max(0.0, 100.0 * others / wall))
            values["cpu_stolen_percent"] = min(100.0, max(0.0, 100.0 * (now.stolen - self._last.stolen) / wall))
        self._last = now
        return values

    def exclusive(self) -> AbstractContextManager[None]:
        """Lock the CPU for a measurement among processes of this package."""
        return lock.exclusive("cpu")


class _CpuSeconds:
    """Seconds of CPU time used since the machine and this process began."""

    def __init__(self, wall: float, busy: float, own: float, stolen: float, cpus: int) -> None:
        self.wall, self.busy, self.own, self.stolen, self.cpus = wall, busy, own, stolen, cpus

    @classmethod
    def now(cls) -> _CpuSeconds:
        times, own = psutil.cpu_times(), os.times()
        busy = float(times.user + times.system + getattr(times, "nice", 0.0))
        mine = own.user + own.system
        return cls(time.monotonic(), busy, mine, float(getattr(times, "steal", 0.0)), os.cpu_count() or 1)
