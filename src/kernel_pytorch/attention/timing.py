# mypy: disable-error-code="no-untyped-call"
"""Time implementations side by side: in turns, from a cold cache, on the device's clock and on the host's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from kernel_pytorch.backends import manager_for
from kernel_pytorch.hardware import cache_bytes, detect

__all__ = ["Samples", "time_in_turns"]

_ROUNDS, _FIRST = 12, 3
_HOPELESS = 1.3
"""An implementation this much slower than the best after the first rounds is not timed on."""
_CRAWLING = 2.5
"""One this much slower in the warm-up is not timed at all."""
_SECONDS = 0.6
_CYCLES_PER_MS = 2_000_000
"""At most: no GPU's clock is much above 2 GHz."""


@dataclass(slots=True)
class Samples:
    """Milliseconds of each call: `device` from the first to the last kernel, `host` until the call returned."""

    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    @property
    def device_ms(self) -> float:
        """Median."""
        return statistics.median(self.device)

    @property
    def host_ms(self) -> float:
        """Median; 0 on a CPU, where the host is the device."""
        return statistics.median(self.host) if self.host else 0.0


def time_in_turns(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = _ROUNDS,
    max_seconds: float = _SECONDS,
) -> dict[str, Samples]:
    """Return samples of each function, taken in turns.

    One that crawls in the warm-up keeps that as its only sample, one that is clearly slower after three rounds gets no
    more of them, and what takes long gets no more than three rounds.

    Args:
        functions: By name; each runs all its work on the device once.
        device: Where they run.
        rounds: Samples of those that may be the fastest.
        max_seconds: No further round begins after this, once there are three.
    """
    clock = _CudaClock(device) if device.type == "cuda" else _CpuClock()
    samples = {name: Samples([clock.warm_up(name, fn)]) for name, fn in functions.items()}
    best = min(one.device_ms for one in samples.values())
    left = {name: fn for name, fn in functions.items() if samples[name].device_ms <= _CRAWLING * best + 0.2}
    for name in left:
        samples[name] = Samples()
    start = time.monotonic()
    for done in range(rounds):
        if done == _FIRST:
            least = {name: min(samples[name].device) for name in left}
            best = min(least.values())
            left = {name: fn for name, fn in left.items() if least[name] <= _HOPELESS * best}
        if done >= _FIRST and time.monotonic() - start > max_seconds:
            break
        for name, fn in left.items():
            clock.sample(name, fn, samples[name])
    return samples


class _CpuClock:
    def __init__(self) -> None:
        self._manager = manager_for("cpu")

    def warm_up(self, name: str, fn: Callable[[], object]) -> float:
        """Run it three times and return the least milliseconds of the last two."""
        del name
        fn()
        return min(self._manager.time_ms(fn), self._manager.time_ms(fn))

    def sample(self, name: str, fn: Callable[[], object], samples: Samples) -> None:
        del name
        samples.device.append(self._manager.time_ms(fn))


class _CudaClock:
    """Events around the call, with the GPU kept busy before it until the host has queued all of it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        size = max(2 * cache_bytes(detect(str(device))), 64 << 20)
        self._scratch = torch.empty(size, dtype=torch.int8, device=device)
        self._host_ms: dict[str, float] = {}

    def warm_up(self, name: str, fn: Callable[[], object]) -> float:
        """Run it three times and return the least milliseconds of the last two, the host's share in them."""
        fn()
        torch.cuda.synchronize(self._device)
        whole = []
        for _ in range(2):
            start = time.perf_counter()
            fn()
            self._host_ms[name] = (time.perf_counter() - start) * 1e3
            torch.cuda.synchronize(self._device)
            whole.append((time.perf_counter() - start) * 1e3)
        return min(whole)

    def sample(self, name: str, fn: Callable[[], object], samples: Samples) -> None:
        with torch.cuda.device(self._device):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            wait_ms = min(2.0 * self._host_ms[name] + 0.2, 20.0)
            torch.cuda._sleep(int(wait_ms * _CYCLES_PER_MS))  # noqa: SLF001 - else a slow launch counts as device time
            self._scratch.zero_()
            begin.record()
            start = time.perf_counter()
            fn()
            samples.host.append((time.perf_counter() - start) * 1e3)
            end.record()
            end.synchronize()
            samples.device.append(float(begin.elapsed_time(end)))
