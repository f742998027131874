"""Decide which implementation is the fastest, from measurements that a busy host disturbs.

What one series of samples says is not believed: its front runners meet again on fresh ones, in turns, and plain SDPA
loses only against what is faster in nearly all of the rounds. So noise costs at most what the margins say.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kernel_pytorch.attention.timing import Samples

__all__ = ["PLAIN", "Clock", "Outcome", "decide", "winner"]

PLAIN = "sdpa"
"""What wins where nothing is clearly faster: what a model calls anyway, and the least work for the host."""

_MARGIN = 0.015
"""Part of plain SDPA's time that another has to save, in the median of the rounds..."""
_EAGER_MARGIN = 0.02
_MOST = 0.75
"""... and the part of the rounds in which it has to be faster."""
_FRONT = 1.1
"""Who meets again: those whose least time is within this factor of the best one's."""
_DUEL_ROUNDS, _DUEL_SECONDS = 11, 0.3
_FIRST_ROUNDS, _FIRST_SECONDS = 6, 0.3
_HIDDEN = 0.5
"""Part of the device's time within which the host's to queue the call does not show."""
_REACH = 1.5
"""Host times of single calls are too long rather than too short: what the device needs beyond this is out of reach."""
_CALLS_MS = 8.0
_CALLS = (3, 20)
_EAGER_FRONT = 1.15
_EAGER_FIRST_ROUNDS, _EAGER_ROUNDS, _EAGER_SECONDS = 5, 9, 0.35


class Clock(Protocol):
    """What `timing.Stopwatch` is."""

    names: list[str]
    crawling: dict[str, float]
    has_host: bool

    def in_turns(
        self, names: Sequence[str], *, rounds: int, max_seconds: float, drop: bool = False
    ) -> dict[str, Samples]:
        """See `timing.Stopwatch`."""

    def back_to_back(
        self, names: Sequence[str], *, calls: int, rounds: int, max_seconds: float, drop: float = 0.0
    ) -> dict[str, list[float]]:
        """See `timing.Stopwatch`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Who won, and the medians in milliseconds.

    Attributes:
        eager: The fastest of calls back to back from Python.
        compiled: The fastest on the device.
        device_ms: Of single calls, on the device.
        host_ms: Until such a call was queued; empty on a CPU.
        eager_ms: Of calls back to back; empty where the device's time alone decides.
    """

    eager: str
    compiled: str
    device_ms: Mapping[str, float]
    host_ms: Mapping[str, float] = field(default_factory=dict)
    eager_ms: Mapping[str, float] = field(default_factory=dict)


def decide(clock: Clock) -> Outcome:
    """Measure, and return the fastest."""
    first = clock.in_turns(clock.names, rounds=_FIRST_ROUNDS, max_seconds=_FIRST_SECONDS, drop=True)
    device_ms = {**clock.crawling, **{name: one.device_ms for name, one in first.items()}}
    host_ms = {name: one.host_ms for name, one in first.items() if one.host}
    least = {name: min(one.device) for name, one in first.items()}
    front = [name for name in clock.names if least[name] <= _FRONT * min(least.values())]
    compiled = front[0]
    if len(front) > 1:
        fresh = clock.in_turns(front, rounds=_DUEL_ROUNDS, max_seconds=_DUEL_SECONDS)
        device_ms |= {name: one.device_ms for name, one in fresh.items()}
        host_ms |= {name: one.host_ms for name, one in fresh.items() if one.host}
        compiled = winner({name: one.device for name, one in fresh.items()}, margin=_MARGIN)
    if not clock.has_host or host_ms[compiled] <= _HIDDEN * device_ms[compiled]:
        return Outcome(compiled, compiled, device_ms, host_ms)
    eager, eager_ms = _fastest_from_python(clock, least, host_ms)
    return Outcome(eager, compiled, device_ms, host_ms, eager_ms)


def _fastest_from_python(
    clock: Clock, least: Mapping[str, float], host_ms: Mapping[str, float]
) -> tuple[str, dict[str, float]]:
    takes = {name: max(ms, host_ms[name]) for name, ms in least.items()}
    reach = _REACH * min(takes.values())
    names = [name for name in clock.names if least[name] <= reach or name == PLAIN]
    calls = min(max(int(_CALLS_MS / min(takes.values())), _CALLS[0]), _CALLS[1])
    seen = clock.back_to_back(
        names, calls=calls, rounds=_EAGER_FIRST_ROUNDS, max_seconds=_EAGER_SECONDS, drop=_EAGER_FRONT
    )
    eager_ms = {name: statistics.median(times) for name, times in seen.items()}
    best = min(min(times) for times in seen.values())
    front = [name for name in names if min(seen[name]) <= _EAGER_FRONT * best]
    if len(front) == 1:
        return front[0], eager_ms
    fresh = clock.back_to_back(front, calls=calls, rounds=_EAGER_ROUNDS, max_seconds=_EAGER_SECONDS)
    eager_ms |= {name: statistics.median(times) for name, times in fresh.items()}
    return winner(fresh, margin=_EAGER_MARGIN), eager_ms


def winner(samples: Mapping[str, Sequence[float]], *, margin: float, plain: str = PLAIN) -> str:
    """Return the name of the least median, or `plain` where that is not clearly slower.

    Args:
        samples: By name, taken in turns: those of one round have the same index.
        margin: Part of the time that has to be saved.
        plain: Wins ties and doubts, if it takes part.
    """
    best = min(samples, key=lambda name: statistics.median(samples[name]))
    if best == plain or plain not in samples:
        return best
    ratios = [one / other for one, other in zip(samples[best], samples[plain], strict=True)]
    clear = statistics.median(ratios) <= 1.0 - margin
    return best if clear and sum(ratio < 1.0 for ratio in ratios) >= _MOST * len(ratios) else plain
