"""What a comparison says, in words and rows that every format shares.

This layer does not know `kernel_pytorch.guard`; it takes whatever has the attributes below.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Protocol

from kernel_pytorch.core.types import Ratio, Verdict
from kernel_pytorch.report import figures

__all__ = ["Compared", "Side", "Suspect", "change", "fails", "headline", "median_ms", "one_line", "rows", "summary"]

_SHORT_REVISION = 10
_MOST = 10.0
"""No change is written as more than a thousand per cent: the interval of two samples may reach that far."""


class Side(Protocol):
    """One side: `kernel_pytorch.guard.types.SideFacts`."""

    @property
    def label(self) -> str: ...  # noqa: D102
    @property
    def revision(self) -> str: ...  # noqa: D102
    @property
    def dirty(self) -> bool: ...  # noqa: D102
    @property
    def python(self) -> str: ...  # noqa: D102
    @property
    def software(self) -> Mapping[str, str]: ...  # noqa: D102
    @property
    def device_key(self) -> str: ...  # noqa: D102
    @property
    def fingerprint(self) -> str: ...  # noqa: D102
    @property
    def telemetry(self) -> Mapping[str, float]: ...  # noqa: D102
    @property
    def kernels_ms(self) -> Mapping[str, float]: ...  # noqa: D102
    @property
    def peak_bytes(self) -> int | None: ...  # noqa: D102


class Suspect(Protocol):
    """What may explain a slowdown: `kernel_pytorch.guard.types.Culprit`."""

    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def what(self) -> str: ...  # noqa: D102
    @property
    def share(self) -> float | None: ...  # noqa: D102
    @property
    def evidence(self) -> Mapping[str, float | str]: ...  # noqa: D102


class Compared(Protocol):
    """One run of the guard: `kernel_pytorch.guard.types.Comparison`."""

    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def verdict(self) -> Verdict: ...  # noqa: D102
    @property
    def reason(self) -> str: ...  # noqa: D102
    @property
    def max_slowdown(self) -> float: ...  # noqa: D102
    @property
    def base(self) -> Side: ...  # noqa: D102
    @property
    def head(self) -> Side: ...  # noqa: D102
    @property
    def created(self) -> str: ...  # noqa: D102
    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def change(self) -> Ratio | None: ...  # noqa: D102
    @property
    def base_samples_ms(self) -> Sequence[float]: ...  # noqa: D102
    @property
    def head_samples_ms(self) -> Sequence[float]: ...  # noqa: D102
    @property
    def paired(self) -> bool: ...  # noqa: D102
    @property
    def notes(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def culprits(self) -> Sequence[Suspect]: ...  # noqa: D102
    @property
    def command(self) -> str: ...  # noqa: D102
    @property
    def seconds(self) -> float: ...  # noqa: D102


def fails(verdict: Verdict, *, inconclusive: str = "pass") -> bool:
    """Return whether a verdict turns a gate red.

    Args:
        verdict: What the guard said.
        inconclusive: `pass` or `fail`: what an undecided comparison counts as.
    """
    if verdict is Verdict.INCONCLUSIVE:
        return inconclusive == "fail"
    return verdict is not Verdict.PASS


def change(ratio: Ratio | None) -> str:
    """Write the change of the time with its interval: `+3.1 % [+2.2 %, +4.0 %]`; a dash where nothing was timed."""
    if ratio is None:
        return "-"
    return f"{_signed(ratio.value)} [{_signed(ratio.low)}, {_signed(ratio.high)}]"


def headline(compared: Compared) -> str:
    """Return what happened in a few words: `11.2 % slower, 3 % allowed`."""
    ratio, allowed = compared.change, f"{figures.percent(compared.max_slowdown)} allowed"
    if ratio is None:
        return f"not timed, {allowed}"
    how = "slower" if ratio.value >= 1.0 else "faster"
    if ratio.low <= 1.0 <= ratio.high:
        how += ", within the noise"
    return f"{_signed(ratio.value).lstrip('+-')} {how}, {allowed}"


def summary(compared: Sequence[Compared]) -> str:
    """Return how many comparisons ended how: `1 FAIL, 3 PASS`, the worst first."""
    order = (Verdict.WRONG, Verdict.FAIL, Verdict.STALE, Verdict.INCONCLUSIVE, Verdict.PASS)
    counts = [(sum(c.verdict is verdict for c in compared), verdict) for verdict in order]
    return ", ".join(f"{n} {verdict}" for n, verdict in counts if n) or "nothing compared"


def median_ms(samples: Sequence[float]) -> float | None:
    """Return the median of the finite samples; `None` without any."""
    finite = [s for s in samples if math.isfinite(s)]
    return statistics.median(finite) if finite else None


def rows(compared: Compared) -> list[tuple[str, str, str]]:
    """Return what the two sides are, by name, base and head: times always, other facts where they differ or matter."""
    base, head = compared.base, compared.head
    table = [("median time", _time(compared.base_samples_ms), _time(compared.head_samples_ms))]
    how = "side by side" if compared.paired else "not side by side"
    table.append((f"samples ({how})", str(len(compared.base_samples_ms)), str(len(compared.head_samples_ms))))
    if base.revision or head.revision:
        table.append(("revision", _revision(base), _revision(head)))
    for name in sorted(set(base.software) | set(head.software)):
        old, new = base.software.get(name, "-"), head.software.get(name, "-")
        if old != new:
            table.append((name, old, new))
    for name, old, new in (
        ("interpreter", base.python, head.python),
        ("device", base.device_key, head.device_key),
        ("model", base.fingerprint[:12], head.fingerprint[:12]),
    ):
        if old != new:
            table.append((name, old or "-", new or "-"))
    if base.peak_bytes is not None and head.peak_bytes is not None:
        table.append(("peak memory", figures.size(base.peak_bytes), figures.size(head.peak_bytes)))
    return table


def one_line(text: str, most: int = 500) -> str:
    """Return foreign text as one line of visible characters, cut at `most`.

    Control characters, line breaks and marks that reorder text (which can make a line read as something else) go.
    """
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    plain = "".join(c if c.isprintable() or c == " " else " " for c in plain)
    plain = re.sub(r"\s+", " ", plain).strip()
    return plain if len(plain) <= most else f"{plain[: most - 3]}..."


def _signed(factor: float) -> str:
    gain = factor - 1.0
    if not gain < _MOST:
        return f"> +{_MOST * 100:.0f} %"
    return f"{gain * 100:+.1f} %"


def _time(samples: Sequence[float]) -> str:
    median = median_ms(samples)
    return "-" if median is None else figures.milliseconds(median)


def _revision(side: Side) -> str:
    shown = side.revision[:_SHORT_REVISION] or "-"
    return f"{shown} + uncommitted changes" if side.dirty else shown
