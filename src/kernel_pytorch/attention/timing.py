# mypy: disable-error-code="no-untyped-call"
"""Time implementations side by side: in turns, on the device's clock, on the host's, and by calls back to back."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kernel_pytorch.backends import manager_for
from kernel_pytorch.hardware import cache_bytes, detect

__all__ = ["Samples", "Stopwatch", "time_in_turns"]

_ROUNDS, _FIRST = 12, 3
_HOPELESS = 1.3
"""An implementation this much slower than the best after the first rounds is not timed on."""
_CRAWLING, _HICCUP_MS = 2.5, 2.0
"""One this much slower in the warm-up, and by more than a hiccup of the host, is not timed at all."""
_SECONDS = 0.6
_SETTLED = 1.2
"""Warm-up ends when a call takes neither this much longer nor shorter than the least before it."""
_WARM_UPS, _WARM_UP_SECONDS = 8, 0.3
_CYCLES_PER_MS = 2_000_000
"""At most: no GPU's clock is much above 2 GHz."""
_MOST_COVER_MS = 20.0
_TRIES = 3


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


class Stopwatch:
    """Times functions, in turns and in changing order, so that what disturbs the machine disturbs all of them.

    Making it runs each until its times settle: compilation, caches on disk and workspaces are in no sample.

    Args:
        functions: By name; each runs all its work on the device once.
        device: Where they run.

    Attributes:
        names: Those that are worth timing; the others crawl.
        crawling: The least milliseconds of a call of each of those, the host's share included.
    """

    def __init__(self, functions: Mapping[str, Callable[[], object]], device: torch.device) -> None:
        self._functions = dict(functions)
        self._clock = _CudaClock(device) if device.type == "cuda" else _CpuClock()
        self.has_host = device.type != "cpu"
        self._turn = 0
        with _no_collection():
            least = {name: self._clock.warm_up(name, fn) for name, fn in self._functions.items()}
        limit = _CRAWLING * min(least.values()) + _HICCUP_MS
        self.crawling = {name: ms for name, ms in least.items() if ms > limit}
        self.names = [name for name in least if name not in self.crawling]

    def in_turns(
        self, names: Sequence[str], *, rounds: int = _ROUNDS, max_seconds: float = _SECONDS, drop: bool = False
    ) -> dict[str, Samples]:
        """Return fresh samples of single calls from a cold cache.

        Args:
            names: Of the functions.
            rounds: Samples of each.
            max_seconds: No further round begins after this, once there are three.
            drop: Whether those that are clearly slower after three rounds get no more of them.
        """
        samples = {name: Samples() for name in names}

        def least(name: str) -> float:
            return min(samples[name].device)

        dropping = (_FIRST, least, _HOPELESS) if drop else None
        for left in self._rounds(names, rounds, max_seconds, dropping):
            for name in left:
                self._clock.sample(name, self._functions[name], samples[name])
        return samples

    def back_to_back(
        self, names: Sequence[str], *, calls: int, rounds: int, max_seconds: float = _SECONDS, drop: float = 0.0
    ) -> dict[str, list[float]]:
        """Return samples of the milliseconds a call takes where many are queued before the host waits.

        It is what a loop in Python pays: the longer of device and host, by measurement, with a warm cache.

        Args:
            names: Of the functions.
            calls: How many are queued for a sample.
            rounds: Samples of each.
            max_seconds: No further round begins after this, once there are three.
            drop: Those slower than the best by this factor after two rounds get no more of them; 0: none are dropped.
        """
        samples: dict[str, list[float]] = {name: [] for name in names}

        def least(name: str) -> float:
            return min(samples[name])

        dropping = (_FIRST - 1, least, drop) if drop else None
        for left in self._rounds(names, rounds, max_seconds, dropping):
            for name in left:
                samples[name].append(self._clock.back_to_back(self._functions[name], calls))
        return samples

    def _rounds(
        self,
        names: Sequence[str],
        rounds: int,
        max_seconds: float,
        dropping: tuple[int, Callable[[str], float], float] | None,
    ) -> Iterator[list[str]]:
        left = list(names)
        start = time.monotonic()
        with _no_collection():
            for done in range(rounds):
                if dropping is not None and done == dropping[0]:
                    _, least, factor = dropping
                    best = min(map(least, left))
                    left = [name for name in left if least(name) <= factor * best]
                if done >= _FIRST and time.monotonic() - start > max_seconds:
                    return
                self._turn += 1
                yield left if self._turn % 2 else left[::-1]


def time_in_turns(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = _ROUNDS,
    max_seconds: float = _SECONDS,
) -> dict[str, Samples]:
    """Return samples of each function, taken in turns.

    One that crawls in the warm-up keeps its least time there as its only sample, one that is clearly slower after
    three rounds gets no more of them, and what takes long gets no more than three rounds.

    Args:
        functions: By name; each runs all its work on the device once.
        device: Where they run.
        rounds: Samples of those that may be the fastest.
        max_seconds: No further round begins after this, once there are three.
    """
    watch = Stopwatch(functions, device)
    found = watch.in_turns(watch.names, rounds=rounds, max_seconds=max_seconds, drop=True)
    return {name: found.get(name) or Samples([watch.crawling[name]]) for name in functions}


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of the times."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _settle(call: Callable[[], float]) -> float:
    """Call until the milliseconds it returns settle; return the least of them, but the first."""
    call()
    start = time.monotonic()
    least = call()
    for _ in range(_WARM_UPS):
        last = call()
        settled = least / _SETTLED <= last <= _SETTLED * least
        least = min(least, last)
        if settled or time.monotonic() - start > _WARM_UP_SECONDS:
            break
    return least


class _CpuClock:
    def __init__(self) -> None:
        self._manager = manager_for("cpu")

    def warm_up(self, name: str, fn: Callable[[], object]) -> float:
        """Run it until its times settle and return the least milliseconds."""
        del name
        return _settle(lambda: self._manager.time_ms(fn))

    def sample(self, name: str, fn: Callable[[], object], samples: Samples) -> None:
        del name
        samples.device.append(self._manager.time_ms(fn))

    def back_to_back(self, fn: Callable[[], object], calls: int) -> float:
        def run() -> None:
            for _ in range(calls):
                fn()

        return self._manager.time_ms(run) / calls


class _CudaClock:
    """Events around the call, with the GPU kept busy before it until the host has queued all of it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        size = max(2 * cache_bytes(detect(str(device))), 64 << 20)
        self._scratch = torch.empty(size, dtype=torch.int8, device=device)
        self._cover_ms: dict[str, float] = {}

    def warm_up(self, name: str, fn: Callable[[], object]) -> float:
        """Run it until its times settle and return the least milliseconds, the host's share in them."""
        hosts = []

        def call() -> float:
            start = time.perf_counter()
            fn()
            hosts.append((time.perf_counter() - start) * 1e3)
            torch.cuda.synchronize(self._device)
            return (time.perf_counter() - start) * 1e3

        least = _settle(call)
        self._cover_ms[name] = min(2.0 * min(hosts) + 0.2, _MOST_COVER_MS)
        return least

    def sample(self, name: str, fn: Callable[[], object], samples: Samples) -> None:
        """Add a sample; one that the GPU began before the host had queued all of it is taken again."""
        with torch.cuda.device(self._device):
            for _ in range(_TRIES):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                cycles = int(self._cover_ms[name] * _CYCLES_PER_MS)
                torch.cuda._sleep(cycles)  # noqa: SLF001 - else a slow launch counts as device time
                self._scratch.zero_()
                begin.record()
                start = time.perf_counter()
                fn()
                host_ms = (time.perf_counter() - start) * 1e3
                late = begin.query()
                end.record()
                end.synchronize()
                if not late:
                    break
                self._cover_ms[name] = min(max(2.0 * self._cover_ms[name], 1.5 * host_ms), _MOST_COVER_MS)
            samples.host.append(host_ms)
            samples.device.append(float(begin.elapsed_time(end)))

    def back_to_back(self, fn: Callable[[], object], calls: int) -> float:
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        torch.cuda.synchronize(self._device)
        return (time.perf_counter() - start) * 1e3 / calls
