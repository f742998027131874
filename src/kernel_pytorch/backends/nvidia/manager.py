"""Run and time on an NVIDIA GPU: CUDA events within wall time, CUDA graphs, the allocator's peak, NVML's telemetry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from kernel_pytorch.backends import accelerator, lock, placement
from kernel_pytorch.backends.nvidia import telemetry
from kernel_pytorch.core.types import DeviceSpec
from kernel_pytorch.hardware import cache_bytes, detect
from kernel_pytorch.hardware.nvidia.probe import VERIFIED_ARCHES

__all__ = ["NvidiaHardwareManager"]

_CAPTURE_WARM_UP = 3
_COVER_CYCLES = 400_000


class NvidiaHardwareManager:
    """The manager of one GPU, or of one MIG slice.

    Args:
        index: Index among the visible GPUs.
        flush_l2: Overwrite the L2 cache before each timed run: right for single kernels, whose inputs would
            otherwise lie in it; a whole model evicts it itself.
    """

    vendor = "nvidia"

    def __init__(self, index: int = 0, *, flush_l2: bool = False) -> None:
        self._device = torch.device("cuda", index)
        self._scratch = accelerator.cache_flush(self._device, cache_bytes(self.spec)) if flush_l2 else None

    @property
    def spec(self) -> DeviceSpec:
        """The GPU, detected once a process."""
        return detect(f"nvidia:{self._device.index}")

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
        """Run `fn` once and return its time in milliseconds from an idle GPU to an idle GPU, the host's part included.

        See `accelerator.time_ms`.
        """
        return accelerator.time_ms(torch.cuda, self._device, fn, self._scratch)

    def time_graph_ms(self, fn: Callable[[], Any], *, samples: int = 20) -> tuple[float, ...]:
        """Capture `fn` once in a CUDA graph, replay it, and return the GPU's own milliseconds of each replay.

        For kernels that are done sooner than the host can launch them: there is no launch in these times, nor the
        wait for one, since the GPU is kept busy (untimed) until begin, replay and end are queued. With `flush_l2`
        each replay begins with a cold L2 cache.

        Args:
            fn: Runs without arguments, allocations of its own or synchronisation with the host; run a few times first.
            samples: Replays.

        Raises:
            RuntimeError: It cannot be captured; torch says why.
        """
        with torch.cuda.device(self._device):
            graph = _captured(fn)
            event: Any = torch.cuda.Event
            marks = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(samples)]
            for begin, end in marks:
                if self._scratch is not None:
                    self._scratch.zero_()
                torch.cuda._sleep(_COVER_CYCLES)  # type: ignore[no-untyped-call]  # noqa: SLF001
                begin.record()
                graph.replay()
                end.record()
                torch.cuda.synchronize()
            return tuple(float(begin.elapsed_time(end)) for begin, end in marks)

    def peak_bytes(self, fn: Callable[[], Any]) -> int | None:
        """Run `fn` once; bytes that torch's allocator handed out at most above what was held before."""
        return accelerator.peak_bytes(torch.cuda, self._device, fn)

    def telemetry(self) -> Mapping[str, float]:
        """Return clocks, power, temperature and throttle reasons; without NVML, or its permission, fewer or none.

        The handle is kept, so that it can be asked beside every sample.
        """
        return telemetry.read(self._uuid())

    def exclusive(self) -> AbstractContextManager[None]:
        """Lock the GPU, by its own identity, for a measurement among processes of this package."""
        return lock.exclusive(f"nvidia-{self._uuid()}")

    def _uuid(self) -> str:
        return str(torch.cuda.get_device_properties(self._device).uuid)


def _captured(fn: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Return `fn` as a CUDA graph; what is lazy (workspaces, compilation) is done before, on a side stream."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_CAPTURE_WARM_UP):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    current = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            fn()
    finally:
        torch.cuda.set_stream(current)  # a capture that fails leaves its own stream the current one
    return graph
