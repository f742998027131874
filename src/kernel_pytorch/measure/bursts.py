"""Functions timed in bursts on a GPU that is kept hot: what counts under a power limit shows only there."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["Bursts"]

_BURST_MS = 12.0
_HEAT_MS = 60.0


class Bursts:
    """Times functions in bursts of some ten milliseconds between events of CUDA, after a warm-up.

    Args:
        typical: Decides how often a burst repeats, and warms up.
    """

    def __init__(self, typical: Callable[[], Any]) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        self._repeats = 1
        once = self._ms(typical)
        self._repeats = max(1, math.ceil(_BURST_MS / max(once, 1e-3)))
        for _ in range(math.ceil(_HEAT_MS / (self._repeats * once))):
            self._ms(typical)

    def _ms(self, run: Callable[[], Any]) -> float:
        begin, end = self._events
        run()
        begin.record()
        for _ in range(self._repeats):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / self._repeats

    def in_turns(self, runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
        """Return the median milliseconds of each, taken forwards and backwards in turn."""
        times: dict[str, list[float]] = {name: [] for name in runs}
        for i in range(rounds):
            order: Sequence[str] = list(runs) if i % 2 else list(reversed(list(runs)))
            for name in order:
                times[name].append(self._ms(runs[name]))
        return {name: statistics.median(seen) for name, seen in times.items()}
