"""What surrounded the two sides and may slow one of them: clocks, foreign load, memory, recompilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from kernel_pytorch.guard.types import Culprit, SideFacts

__all__ = ["Slowdown", "Suspect", "circumstances"]

_CLOCKS = {
    "sm_clock_mhz": ("SM clock", 0.015),
    "memory_clock_mhz": ("memory clock", 0.015),
    "clock_mhz": ("CPU clock", 0.03),
}
"""By name in the telemetry: for people, and the relative fall below which it is noise. A GPU's clock moves in steps of
0.8 %; what a kernel tells of a CPU's is the moment's, of all cores."""
_THROTTLING = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "held to another GPU's clock",
    0x20: "thermal slowdown",
    0x40: "thermal slowdown by hardware",
    0x80: "power brake",
}
"""Bits of NVML's `nvmlClocksEventReasons` that tell of clocks held down; an idle GPU and a chosen clock are none."""
_EXPLAINS = 0.15
"""A clock whose fall explains a smaller share of the slowdown is not its reason."""
_MEMORY_GROWTH, _MEMORY_BYTES = 0.05, 16 << 20
_NEARLY_FULL = 0.9


@dataclass(frozen=True, slots=True)
class Slowdown:
    """How much slower, and where the profiles put it.

    Attributes:
        fraction: 0.03 for 3 %; 0.0 where it is not known.
        ms: Of one call; `None` where it is not known.
        profiled: Whether both sides have a profile.
        shares: Share by class of kernels, with `idle` (between kernels) and `alike` (all kernels by one factor).
    """

    fraction: float = 0.0
    ms: float | None = None
    profiled: bool = False
    shares: Mapping[str, float] | None = None

    def share(self, *kinds: str) -> float:
        """Return the share that some classes have together."""
        return min(1.0, sum((self.shares or {}).get(kind, 0.0) for kind in kinds))


@dataclass(frozen=True, slots=True)
class Suspect:
    """A culprit and how likely it is the reason, from 0 to 1."""

    culprit: Culprit
    weight: float


def circumstances(base: SideFacts, head: SideFacts, slowdown: Slowdown) -> Iterator[Suspect]:
    """Give what differs in the sides' telemetry and memory beyond noise, where the direction explains a slowdown."""
    yield from _clocks(base.telemetry, head.telemetry, slowdown)
    yield from _load(base.telemetry, head.telemetry, slowdown)
    yield from _memory(base, head, slowdown)
    yield from _compilation(base.telemetry, head.telemetry, slowdown)


def _clocks(base: Mapping[str, float], head: Mapping[str, float], slowdown: Slowdown) -> Iterator[Suspect]:
    throttled = _throttling(base, head)
    reason = f" ({' and '.join(throttled)})" if throttled else ""
    beside = {
        f"{side}_{name}": values[name]
        for name in ("power_watts", "temperature_celsius", "throttle_reasons")
        for side, values in (("base", base), ("head", head))
        if name in values
    }
    found = False
    for name, (words, noise) in _CLOCKS.items():
        old, new = base.get(name, 0.0), head.get(name, 0.0)
        if old <= 0.0 or new <= 0.0 or old / new - 1.0 < noise:
            continue
        share = min(1.0, (old / new - 1.0) / slowdown.fraction) if slowdown.fraction > 0.0 else None
        if share is not None and share < _EXPLAINS:
            continue
        found = True
        told = f", which explains {_percent(share)} of the slowdown" if share is not None and share < 1.0 else ""
        what = f"{words} {old:.0f} -> {new:.0f} MHz{reason}{told}"
        evidence = {f"base_{name}": old, f"head_{name}": new, **beside}
        yield Suspect(Culprit("clocks", what, share, evidence), (share or 0.5) * _everywhere(slowdown))
    if throttled and not found:
        what = f"clocks were held down on head only: {' and '.join(throttled)}"
        yield Suspect(Culprit("clocks", what, None, beside), 0.3 * _everywhere(slowdown))


def _everywhere(slowdown: Slowdown) -> float:
    """Return how well a reason that slows every kernel fits the profiles; just above 1 where they all got slower."""
    if not slowdown.profiled:
        return 0.9
    return 1.05 if slowdown.share("alike") > 0.3 else 0.35


def _throttling(base: Mapping[str, float], head: Mapping[str, float]) -> list[str]:
    new = int(head.get("throttle_reasons", 0)) & ~int(base.get("throttle_reasons", 0))
    return [words for bit, words in _THROTTLING.items() if new & bit]


def _load(base: Mapping[str, float], head: Mapping[str, float], slowdown: Slowdown) -> Iterator[Suspect]:
    for name, least, words in (
        ("foreign_load_cores", 0.1, "other processes kept {old:.1f} -> {new:.1f} cores busy"),
        ("cpu_others_percent", 5.0, "other processes took {old:.0f} -> {new:.0f} % of the CPU"),
        ("cpu_stolen_percent", 2.0, "the hypervisor took {old:.0f} -> {new:.0f} % of the CPU"),
        ("gpu_others_percent", 5.0, "other processes took {old:.0f} -> {new:.0f} % of the GPU"),
    ):
        old, new = base.get(name, 0.0), head.get(name, 0.0)
        if new - old < least:
            continue
        fits = max(slowdown.share("alike"), slowdown.share("idle"), 0.3) if slowdown.profiled else 0.6
        evidence = {f"base_{name}": old, f"head_{name}": new}
        yield Suspect(Culprit("load", words.format(old=old, new=new), None, evidence), 0.9 * fits)


def _memory(base: SideFacts, head: SideFacts, slowdown: Slowdown) -> Iterator[Suspect]:
    retries = [int(side.telemetry.get("allocator_retries", 0)) for side in (base, head)]
    old, new = base.peak_bytes, head.peak_bytes
    capacity = head.telemetry.get("memory_total_bytes", 0.0)
    evidence: dict[str, float | str] = {}
    told, weight = [], 0.0
    if old is not None and new is not None:
        evidence = {"base_peak_bytes": float(old), "head_peak_bytes": float(new)}
        if new - old >= _MEMORY_BYTES and new > old * (1.0 + _MEMORY_GROWTH):
            told.append(f"peak memory {_size(old)} -> {_size(new)}")
            weight = 0.15 + 0.3 * slowdown.share("copy", "idle")
            if capacity and new >= _NEARLY_FULL * capacity:
                told.append(
                    f"{_percent(new / capacity)} of the device's {_size(capacity)}: the allocator frees and retries"
                )
                evidence["memory_total_bytes"] = capacity
                weight = 0.6
    if retries[1] > retries[0]:
        told.append(f"the allocator had to free its cache and retry {retries[0]} -> {retries[1]} times")
        evidence |= {"base_allocator_retries": float(retries[0]), "head_allocator_retries": float(retries[1])}
        weight = 0.85
    if told:
        yield Suspect(Culprit("memory", ", ".join(told), None, evidence), weight)


def _compilation(base: Mapping[str, float], head: Mapping[str, float], slowdown: Slowdown) -> Iterator[Suspect]:
    weights: dict[str, tuple[str, Callable[[], float]]] = {
        "recompilations": ("recompilations while it was timed", lambda: 0.9 if slowdown.share("idle") > 0.3 else 0.7),
        "graph_breaks": ("graph breaks", lambda: 0.4 + 0.5 * slowdown.share("idle", "fused")),
    }
    for name, (words, weight) in weights.items():
        old, new = base.get(name, 0.0), head.get(name, 0.0)
        if new > old:
            evidence = {f"base_{name}": old, f"head_{name}": new}
            what = f"{words} {old:.0f} -> {new:.0f}"
            yield Suspect(Culprit("recompilation", what, None, evidence), weight())


def _percent(share: float) -> str:
    return f"{100.0 * share:.0f} %"


def _size(count: float) -> str:
    return f"{count / (1 << 30):.2f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.0f} MiB"
