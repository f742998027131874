"""Change points over a history, as Apache Otava sees them."""

from __future__ import annotations

import itertools
import random
import statistics
from dataclasses import replace

import pytest

from kernel_pytorch.core.types import Verdict
from kernel_pytorch.guard.history import HistoryError, changes
from tests.history.made import make_series

pytest.importorskip("otava.analysis", reason="pip install --no-deps apache-otava==0.8.0")


def noisy(level: float, count: int, seed: int, cv: float = 0.01) -> list[float]:
    source = random.Random(seed)
    return [level * (1 + source.gauss(0, cv)) for _ in range(count)]


def test_a_step_is_found_where_it_is():
    runs = make_series(noisy(10, 20, 1) + noisy(11, 20, 2))
    points = changes(runs)
    assert [(p.metric, p.run_id, p.previous_id) for p in points] == [
        ("ms", "run-000020", "run-000019"),
        ("change", "run-000020", "run-000019"),
    ]
    ms = points[0]
    assert ms.change == pytest.approx(1.1, abs=0.01)
    assert ms.before == pytest.approx(10, rel=0.01)
    assert ms.after == pytest.approx(11, rel=0.01)
    assert ms.p_value < 0.001
    assert ms.revision == f"{20:040x}"
    assert ms.created == runs[20].created


def test_what_else_changed_there_is_told():
    runs = make_series([10.0, 10.1, 10.05, 9.95, 10.0, 12.0, 12.1, 11.9, 12.05, 12.0])
    for index in range(5, 10):
        head = replace(runs[index].head, software={"torch": "2.13.0", "triton": "3.9"}, fingerprint="another")
        runs[index] = replace(runs[index], head=head)
    point = changes(runs)[0]
    assert point.run_id == "run-000005"
    assert point.differences == (
        f"revision {4:040x}"[:19] + f" -> {5:040x}"[:14],
        "python 3.11.7 -> none",
        "torch 2.12.1 -> 2.13.0",
        "triton none -> 3.9",
        "the model itself (another fingerprint)",
    )


def test_noise_alone_has_few_change_points():
    """Two series each (time and change), of which less than 1 % have one."""
    assert sum(len(changes(make_series(noisy(10, 30, seed)))) for seed in range(40)) <= 2


def test_levels_are_those_between_the_points_that_are_left():
    """Otava itself keeps the level of a neighbour that it dropped: in 15 % of such series."""
    for seed in range(60):
        runs = make_series(noisy(10, 15, seed) + noisy(10.3, 15, 1000 + seed))
        points = [p for p in changes(runs) if p.metric == "ms"]
        cuts = [0, *(int(p.run_id[-6:]) for p in points), len(runs)]
        levels = [
            statistics.fmean(run.head_samples_ms[0] for run in runs[start:end])
            for start, end in itertools.pairwise(cuts)
        ]
        for point, (before, after) in zip(points, itertools.pairwise(levels), strict=True):
            assert (point.before, point.after) == pytest.approx((before, after))
            assert point.p_value < 0.001


def test_a_single_outlier_is_no_change_of_level():
    values = noisy(10, 30, 3)
    values[15] = 30.0
    assert changes(make_series(values)) == []


def test_two_steps_are_two_points():
    points = [
        p for p in changes(make_series(noisy(10, 15, 4) + noisy(12, 15, 5) + noisy(10, 15, 6))) if p.metric == "ms"
    ]
    assert [p.run_id for p in points] == ["run-000015", "run-000030"]
    assert points[0].change > 1.15
    assert points[1].change < 0.87


def test_names_and_devices_are_series_of_their_own():
    fast = make_series(noisy(10, 12, 7), name="a")
    slow = [replace(run, head=replace(run.head, device_key="gpu")) for run in make_series(noisy(20, 12, 8), name="a")]
    other = make_series(noisy(30, 12, 9), name="b")
    assert changes([*fast, *slow, *other]) == []
    mixed = [replace(run, head=replace(run.head, device_key="cpu-x86-2")) for run in slow]
    assert [p.run_id for p in changes([*fast, *mixed]) if p.metric == "ms"] == ["run-000000"]


def test_runs_that_say_nothing_of_speed_take_no_part():
    runs = make_series(noisy(10, 8, 10) + [50.0] * 8)
    runs[8:] = [
        replace(run, **({"verdict": verdict} if verdict else {"change": None}))
        for run, verdict in zip(runs[8:], [Verdict.WRONG, Verdict.STALE, None] * 3, strict=False)
    ]
    assert changes(runs) == []


def test_a_short_or_empty_history_has_none():
    assert changes([]) == []
    assert changes(make_series([10.0, 20.0, 30.0])) == []
    assert changes(make_series([10.0] * 10)) == []


def test_without_otava_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "otava.analysis", None)
    with pytest.raises(HistoryError, match="Otava") as caught:
        changes(make_series(noisy(10, 8, 1)))
    assert "pip install --no-deps apache-otava" in caught.value.fix
