"""Where the level of a history shifted, found by Apache Otava.

The algorithm is Hunter's (Fleming et al., ICPE 2023, doi:10.1145/3578244.3583719): E-divisive (Matteson and James,
arXiv:1306.4933) in sliding windows, then Student's t-test for each point that it proposes.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kernel_pytorch.core.types import Verdict
from kernel_pytorch.guard.history.errors import MissingPackageError
from kernel_pytorch.guard.types import Comparison

__all__ = ["ChangePoint", "changes"]

MAX_P_VALUE = 0.0003
"""Simulated (`benchmarks/results/guard/history_changes.json`), independent runs with a CV of 1 %: of histories in which
nothing changed, up to 2 % have a point, where Otava's 0.001 gives 2 % (8 runs) to 21 % (240). A step of 3 % is found
in 82 % of 15 runs and 94 % of 30, a median of 3 runs after it happened; one of 5 % after 1. Where slow days follow each
other (autocorrelation 0.5), 17 % of 30 runs have a false point: a change point is a place to look at, not a verdict.
"""
MIN_CHANGE = 0.01
"""Smaller shifts are not reported."""
LEAST_RUNS = 4
"""Two a side: with fewer there is no spread to compare a shift with."""

Metric = Literal["ms", "change"]


@dataclass(frozen=True, slots=True)
class ChangePoint:
    """A run from which on the level of a series is another.

    Attributes:
        name: `Comparison.name`.
        metric: `ms` (median time of head) or `change` (head over base).
        device: `DeviceSpec.key`: the times of two devices are two series.
        run_id: The first run on the new level; `previous_id` the last one before it.
        created: Of that first run.
        revision: Head's revision there; empty where there is none.
        before: Mean of the series back to the change point before, `after` up to the next; ms, or a ratio.
        change: `after / before`: 1.03 is 3 % more time.
        p_value: Of Student's t-test; the place was chosen by the data, so it is smaller than the true chance.
        differences: What else changed between the two runs, one line each: revision, software, model.
    """

    name: str
    metric: Metric
    device: str
    run_id: str
    previous_id: str
    created: str
    revision: str
    before: float
    after: float
    change: float
    p_value: float
    differences: tuple[str, ...] = ()


def changes(runs: Sequence[Comparison]) -> list[ChangePoint]:
    """Return the change points of runs, in time order within each name, device and metric.

    Runs that were not judged (`STALE`), compute something else (`WRONG`) or have no samples take no part.

    Args:
        runs: Oldest first; of any names and devices.

    Raises:
        MissingPackageError: Apache Otava is not installed.
    """
    series: dict[tuple[str, str], list[Comparison]] = defaultdict(list)
    for run in runs:
        if run.verdict not in {Verdict.STALE, Verdict.WRONG}:
            series[run.name, run.head.device_key].append(run)
    values: dict[Metric, Callable[[Comparison], float]] = {"ms": _head_ms, "change": _change}
    found = []
    for (_, _), members in sorted(series.items()):
        for metric, value in values.items():
            usable = [(run, v) for run in members if math.isfinite(v := value(run)) and v > 0]
            if len(usable) >= LEAST_RUNS:
                found += _points(metric, [run for run, _ in usable], [v for _, v in usable])
    return found


def _head_ms(run: Comparison) -> float:
    return statistics.median(run.head_samples_ms) if run.head_samples_ms and run.change else math.nan


def _change(run: Comparison) -> float:
    return run.change.value if run.change else math.nan


def _points(metric: Metric, runs: list[Comparison], values: list[float]) -> list[ChangePoint]:
    found = []
    for point in _settled(values):
        run, previous = runs[point.index], runs[point.index - 1]
        before, after = float(point.stats.mean_1), float(point.stats.mean_2)
        found.append(
            ChangePoint(
                name=run.name,
                metric=metric,
                device=run.head.device_key,
                run_id=run.id,
                previous_id=previous.id,
                created=run.created,
                revision=run.head.revision,
                before=before,
                after=after,
                change=after / before,
                p_value=float(point.stats.pvalue),
                differences=_differences(previous, run),
            )
        )
    return found


def _settled(values: list[float]) -> list[Any]:
    """Return Otava's change points, tested against the levels that are left.

    When Otava 0.8 drops a point, it tests the next two again, but not the one before (github.com/apache/otava/pull/96
    has the discussion), so that a level and a p-value may be of neighbours that are gone. Its own steps are repeated
    until none changes anything.
    """
    try:
        from otava.analysis import TTestSignificanceTester, compute_change_points, merge
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "change points need Apache Otava, which is not installed",
            fix="pip install --no-deps apache-otava==0.8.0  (its pins of numpy and scipy are stricter than its code)",
        ) from error
    limits = {"max_pvalue": MAX_P_VALUE, "min_magnitude": MIN_CHANGE}
    points, _ = compute_change_points(values, **limits)
    tester = TTestSignificanceTester(MAX_P_VALUE)
    while True:
        intervals = tester.get_intervals(points)
        tested = [tester.change_point(point.to_candidate(), values, intervals) for point in points]
        kept: list[Any] = merge(list(tested), values, **limits)
        if len(kept) == len(points):
            return kept
        points = kept


def _differences(old: Comparison, new: Comparison) -> tuple[str, ...]:
    found = []
    if old.head.revision != new.head.revision:
        found.append(f"revision {old.head.revision[:10] or 'none'} -> {new.head.revision[:10] or 'none'}")
    before, after = old.head.software, new.head.software
    found += [
        f"{name} {before.get(name, 'none')} -> {after.get(name, 'none')}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
    if old.head.fingerprint != new.head.fingerprint:
        found.append("the model itself (another fingerprint)")
    return tuple(found)
