"""Run and time on an NVIDIA GPU: CUDA events within wall time, CUDA graphs, the allocator's peak, NVML's telemetry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from kernel_pytorch.backends.accelerator import Accelerator
from kernel_pytorch.backends.capture import end_failed_capture
from kernel_pytorch.backends.nvidia import telemetry

__all__ = ["NvidiaHardwareManager"]

_CAPTURE_WARM_UP = 3
_COVER_CYCLES = 400_000


class NvidiaHardwareManager(Accelerator):
    """The manager of one GPU, or of one MIG slice."""

    vendor = "nvidia"
    torch_type = "cuda"

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

    def telemetry(self) -> Mapping[str, float]:
        """Return clocks, power, temperature and throttle reasons; without NVML, or its permission, fewer or none.

        The handle is kept, so that it can be asked beside every sample.
        """
        return telemetry.read(self._uuid())


def _captured(fn: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Return `fn` as a CUDA graph; what is lazy (workspaces, compilation) is done before, on a side stream."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_CAPTURE_WARM_UP):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        # The stream is set here as well: torch.cuda.graph leaves it set where ending the capture raises.
        with torch.cuda.stream(side), torch.cuda.graph(graph, pool=pool, stream=side):
            fn()
    except BaseException:
        end_failed_capture(torch.device("cuda", torch.cuda.current_device()), pool, side)
        raise
    return graph
