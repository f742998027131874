"""The history as one self-contained HTML page: the time of every comparison over its runs, and where it shifted.

This layer does not know `kernel_pytorch.guard`; it takes whatever has the attributes of `Compared` and `Shift`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kernel_pytorch.core.types import Ratio, Verdict
from kernel_pytorch.report import figures
from kernel_pytorch.report.compared import Compared, change, median_ms, one_line

__all__ = ["Shift", "trends_page", "write_trends"]

_WORST_FIRST = (Verdict.WRONG, Verdict.FAIL, Verdict.STALE, Verdict.INCONCLUSIVE, Verdict.PASS)
_TAGS = {
    Verdict.PASS: "ok",
    Verdict.FAIL: "wrong",
    Verdict.WRONG: "failed",
    Verdict.STALE: "timeout",
    Verdict.INCONCLUSIVE: "kept",
}
"""How `report.css` colours a verdict."""
_MOST_RUNS = 1000
"""Of one series; a browser draws no more in reasonable time."""
_LEAST_RUNS = 4
"""Of one series, before a change point can be told from noise."""
_WIDEST = 9.0
"""An interval is drawn up to ten times the time; that of two samples may reach infinity."""


class Shift(Protocol):
    """A change point: `kernel_pytorch.guard.history.ChangePoint`."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def metric(self) -> str: ...  # noqa: D102
    @property
    def device(self) -> str: ...  # noqa: D102
    @property
    def run_id(self) -> str: ...  # noqa: D102
    @property
    def before(self) -> float: ...  # noqa: D102
    @property
    def after(self) -> float: ...  # noqa: D102
    @property
    def change(self) -> float: ...  # noqa: D102
    @property
    def differences(self) -> Sequence[str]: ...  # noqa: D102


def write_trends(
    runs: Sequence[Compared], shifts: Sequence[Shift], path: Path, *, source: str, notes: Sequence[str] = ()
) -> None:
    """Write the page, replacing it in one step where it exists.

    Args:
        runs: Oldest first, of any names and devices.
        shifts: Change points of these runs.
        path: The HTML file.
        source: What the runs are of, for people: the history's address without secrets.
        notes: What readers should know besides, e.g. why there are no change points.

    Raises:
        OSError: The file cannot be written.
    """
    path = Path(path)
    text = trends_page(runs, shifts, source=source, notes=notes)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def trends_page(runs: Sequence[Compared], shifts: Sequence[Shift], *, source: str, notes: Sequence[str] = ()) -> str:
    """Return the page as one HTML document that loads nothing else; the arguments are those of `write_trends`."""
    environment = Environment(
        loader=PackageLoader("kernel_pytorch.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    grouped: dict[tuple[str, str], list[Compared]] = defaultdict(list)
    for run in runs:
        grouped[run.name, run.head.device_key].append(run)
    series = [_series(members, shifts) for members in grouped.values()]
    series.sort(key=lambda s: (s["rank"], s["title"]))
    for number, one in enumerate(series, 1):
        one["anchor"] = f"series-{number}"
    return environment.get_template("trends.html.j2").render(
        series=series,
        charts={s["anchor"]: s["chart"] for s in series if s["chart"]},
        cards=_cards(runs, series),
        headline=_headline(series),
        source=source,
        notes=list(notes),
        package_version=_package_version(),
        least_runs=_LEAST_RUNS,
        **_assets(),
    )


@cache
def _assets() -> Mapping[str, Any]:
    """Return the parts of the page that no history changes, and the hashes its content policy allows to run."""
    here = files("kernel_pytorch.report")
    theme = (here / "templates" / "theme.js").read_text("utf-8")
    script = (here / "templates" / "trends.js").read_text("utf-8")
    library = (here / "vendor" / "echarts.common.min.js").read_text("utf-8")
    assert not any("</script" in text.lower() for text in (theme, script, library))
    digests = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in (theme, library, script))
    return {
        "theme_script": Markup(theme),  # noqa: S704  # the package's own files, not a run's text
        "library": Markup(library),  # noqa: S704
        "script": Markup(script),  # noqa: S704
        "style": Markup((here / "templates" / "report.css").read_text("utf-8")),  # noqa: S704
        "script_hashes": Markup(" ".join(f"'sha256-{d}'" for d in digests)),  # noqa: S704
        "echarts_version": json.loads((here / "vendor" / "echarts.version.json").read_text("utf-8"))["version"],
    }


def _package_version() -> str:
    try:
        return version("kernel-pytorch")
    except PackageNotFoundError:
        return "from source"


def _series(members: Sequence[Compared], shifts: Sequence[Shift]) -> dict[str, Any]:
    shown = list(members[-_MOST_RUNS:])
    last = shown[-1]
    index = {run.id: number for number, run in enumerate(shown)}
    device = last.head.device_key
    own = [s for s in shifts if s.name == last.name and s.device == device and s.run_id in index]
    own.sort(key=lambda s: index[s.run_id])
    timed = any(run.head_samples_ms for run in shown)
    return {
        "title": one_line(last.name, 120) or "unnamed",
        "device": one_line(device, 60),
        "rank": _WORST_FIRST.index(last.verdict),
        "verdicts": [str(v) for v in reversed(_WORST_FIRST) if any(run.verdict is v for run in shown)],
        "runs": len(members),
        "left_out": len(members) - len(shown),
        "failed": sum(run.verdict in {Verdict.FAIL, Verdict.WRONG} for run in members),
        "first": _moment(members[0]),
        "last": _row(last, shown[-2] if len(shown) > 1 else None),
        "level": _level(own, shown, index),
        "shifts": _told(own, shown, index),
        "rows": [_row(run, old) for run, old in reversed(list(zip(shown, [None, *shown[:-1]], strict=True)))],
        "timed": timed,
        "chart": _chart(shown, own, index) if timed else None,
    }


def _row(run: Compared, previous: Compared | None) -> dict[str, Any]:
    head, base = median_ms(run.head_samples_ms), median_ms(run.base_samples_ms)
    return {
        "id": one_line(run.id, 60),
        "when": _moment(run),
        "verdict": str(run.verdict),
        "tag": _TAGS[run.verdict],
        "change": change(run.change) if run.change else "",
        "base": "" if base is None else figures.milliseconds(base),
        "head": "" if head is None else figures.milliseconds(head),
        "revision": _revision(run),
        "reason": one_line(run.reason, 300),
        "new": _new_software(run, previous),
    }


def _told(shifts: Sequence[Shift], runs: Sequence[Compared], index: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return one entry for each run at which something shifted, the newest first."""
    by_run: dict[str, list[Shift]] = defaultdict(list)
    for shift in shifts:
        by_run[shift.run_id].append(shift)
    return [
        {
            "when": _moment(runs[index[run_id]]),
            "slower": found[0].change > 1.0,
            "texts": [_shift_text(s) for s in found],
            "differences": [one_line(d, 120) for d in found[0].differences],
        }
        for run_id, found in reversed(by_run.items())
    ]


def _shift_text(shift: Shift) -> str:
    if shift.metric == "ms":
        old, new = figures.milliseconds(shift.before), figures.milliseconds(shift.after)
        return f"time {old} → {new} ({_percent(shift.change)})"
    return f"against the other side {_percent(shift.before)} → {_percent(shift.after)}"


def _level(shifts: Sequence[Shift], runs: Sequence[Compared], index: Mapping[str, int]) -> str:
    times = [s for s in shifts if s.metric == "ms"]
    return f"{_percent(times[-1].change)} on {_moment(runs[index[times[-1].run_id]])[:10]}" if times else ""


def _chart(runs: Sequence[Compared], shifts: Sequence[Shift], index: Mapping[str, int]) -> dict[str, Any]:
    software: dict[str, int] = {}
    points = []
    for run in runs:
        versions = one_line(", ".join(f"{k} {v}" for k, v in run.head.software.items()), 300)
        head, base = median_ms(run.head_samples_ms), median_ms(run.base_samples_ms)
        points.append(
            {
                "when": _moment(run),
                "verdict": str(run.verdict),
                "head": head,
                "base": base,
                **_bounds(run.change),
                "change_text": change(run.change) if run.change else "not timed",
                "revision": _revision(run),
                "software": software.setdefault(versions, len(software)),
                "reason": one_line(run.reason, 200),
                "id": one_line(run.id, 60),
            }
        )
    return {
        "points": points,
        "software": list(software),
        "allowed": runs[-1].max_slowdown * 100,
        "levels": _levels(points, [index[s.run_id] for s in shifts if s.metric == "ms"]),
        "shifts": [
            {
                "at": index[s.run_id],
                "metric": s.metric,
                "slower": s.change > 1.0,
                "label": _percent(s.change),
                "text": _shift_text(s),
            }
            for s in shifts
        ],
    }


def _bounds(ratio: Ratio | None) -> dict[str, float | None]:
    """Return the change and its interval in per cent; what is no number, or endless, is left out or cut."""
    if ratio is None or not math.isfinite(ratio.value):
        return {"change": None, "low": None, "high": None}

    def percent(value: float) -> float:
        return 100 * min(_WIDEST, max(-1.0, value - 1 if not math.isnan(value) else ratio.value - 1))

    return {"change": percent(ratio.value), "low": percent(ratio.low), "high": percent(ratio.high)}


def _levels(points: Sequence[Mapping[str, Any]], cuts: Sequence[int]) -> list[float | None]:
    """Return the mean time between the change points, for each run; nothing where no change point was found."""
    levels: list[float | None] = []
    for start, end in zip([0, *cuts], [*cuts, len(points)], strict=True):
        times = [p["head"] for p in points[start:end] if p["head"] is not None and p["change"] is not None]
        levels += [statistics.fmean(times) if times and cuts else None] * (end - start)
    return levels


def _moment(run: Compared) -> str:
    return one_line(run.created[:16].replace("T", " "), 16)


def _revision(run: Compared) -> str:
    revision = one_line(run.head.revision[:10], 10)
    return f"{revision} + changes" if revision and run.head.dirty else revision


def _new_software(run: Compared, previous: Compared | None) -> str:
    if previous is None:
        return one_line(", ".join(f"{k} {v}" for k, v in run.head.software.items()), 300)
    old, new = previous.head.software, run.head.software
    names = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
    return one_line(", ".join(f"{k} {old.get(k, 'none')} → {new.get(k, 'none')}" for k in names), 300)


def _percent(factor: float) -> str:
    return f"{(factor - 1) * 100:+.1f} %".replace("-", "\N{MINUS SIGN}")


def _headline(series: Sequence[Mapping[str, Any]]) -> str:
    if not series:
        return "No runs yet"
    bad = sum(s["last"]["verdict"] in {"FAIL", "WRONG"} for s in series)
    open_ = sum(s["last"]["verdict"] in {"STALE", "INCONCLUSIVE"} for s in series)
    if bad:
        return "It fails now" if len(series) == 1 else f"{bad} of {len(series)} fail now"
    if open_:
        return "Not decided" if len(series) == 1 else f"{open_} of {len(series)} not decided"
    return "Not slower than allowed" if len(series) == 1 else f"None of {len(series)} is slower than allowed"


def _cards(runs: Sequence[Compared], series: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    if not runs:
        return []
    counts = {v: sum(run.verdict is v for run in runs) for v in _WORST_FIRST}
    rest = ", ".join(f"{n} {v}" for v, n in counts.items() if n)
    shifts = sum(len(s["shifts"]) for s in series)
    slower = sum(shift["slower"] for s in series for shift in s["shifts"])
    latest = max(runs, key=lambda run: run.created)
    return [
        ("Runs", f"{len(runs):,}", rest),
        ("Series", str(len(series)), "one for each name and device"),
        ("Change points", str(shifts), f"{slower} to slower, {shifts - slower} to faster" if shifts else "none found"),
        ("Latest run", _moment(latest), f"{latest.verdict}: {one_line(latest.name, 60)}"),
    ]
