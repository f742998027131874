"""A slower head is looked at again in fresh processes: what that takes back, and what it lets stand."""

from __future__ import annotations

import math
import random

import pytest

from kernel_pytorch.core.types import Ratio, Verdict
from kernel_pytorch.guard.compare import _confirmed, _Found, _joined
from kernel_pytorch.guard.fresh import judge_fresh
from kernel_pytorch.guard.processes import SideFailed
from kernel_pytorch.guard.turns import Run


def found() -> _Found:
    return _Found(Verdict.FAIL, "the head is slower", Ratio(1.06, 1.03, 1.09), ["a note"])


def run(ratio: float, *, pairs: int = 40, noise: float = 0.01, seed: int = 0) -> Run:
    rng = random.Random(seed)
    base = [100.0 * rng.lognormvariate(0.0, noise) for _ in range(pairs)]
    return Run(tuple(base), tuple(ratio * 100.0 * rng.lognormvariate(0.0, noise) for _ in base))


def judged(ratios, *, noise: float = 0.01, seed: int = 0):
    """Look after each fresh pair of processes, as a comparison does, and return the last look and how many it took."""
    runs = []
    for i, ratio in enumerate(ratios):
        one = run(ratio, noise=noise, seed=1000 * seed + i)
        runs.append((one.base_ms, one.head_ms))
        fresh = judge_fresh(runs, 0.03)
        if fresh.decided:
            return fresh, len(runs)
    return fresh, len(runs)


@pytest.mark.parametrize("ratio", [1.03, 1.06, 2.0])
def test_what_fresh_processes_show_again_stands(ratio: float) -> None:
    fresh, took = judged([ratio] * 8)
    assert took == 3
    seen = _confirmed(found(), fresh, run(ratio))
    assert seen.verdict is Verdict.FAIL
    assert seen.change == found().change
    assert "confirmed by" in seen.reason
    assert "3 fresh pairs of processes" in seen.reason


@pytest.mark.parametrize("ratio", [0.9, 1.0, 1.005])
def test_what_fresh_processes_do_not_show_is_taken_back(ratio: float) -> None:
    fresh, took = judged([ratio] * 8)
    assert took == 2, "at once"
    seen = _confirmed(found(), fresh, run(ratio))
    assert seen.verdict is Verdict.INCONCLUSIVE
    assert "+6.0 %" in seen.reason
    assert "others do not prove" in seen.reason
    assert seen.notes == ["a note"]


def share_called_slower(effect: float, luck: float, *, noise: float = 0.02) -> float:
    """Share of suspected heads that fresh processes confirm, where each pair has luck of its own."""
    slower = 0
    for seed in range(300):
        rng = random.Random(seed)
        ratios = [math.exp(math.log1p(effect) + rng.gauss(0.0, luck)) for _ in range(8)]
        slower += judged(ratios, noise=noise, seed=seed)[0].slower
    return slower / 300


@pytest.mark.parametrize("luck", [0.005, 0.02, 0.05])
def test_the_luck_of_processes_is_rarely_taken_for_a_change(luck: float) -> None:
    assert share_called_slower(0.0, luck) <= 0.02  # of those suspected, themselves few


@pytest.mark.parametrize(("effect", "luck", "least"), [(0.03, 0.003, 0.97), (0.05, 0.01, 0.95), (0.10, 0.02, 0.95)])
def test_a_change_beyond_luck_is_confirmed(effect: float, luck: float, least: float) -> None:
    assert share_called_slower(effect, luck, noise=0.01) >= least


def test_a_failure_confirms_nothing() -> None:
    failed = run(1.1, pairs=12)
    failed.failure = SideFailed("head: died", "its last words")
    seen = _confirmed(found(), judge_fresh([], 0.03), failed)
    assert seen.verdict is Verdict.INCONCLUSIVE
    assert "died" in seen.reason
    assert "+6.0 %" in seen.reason
    assert any("last words" in note for note in seen.notes)


def test_samples_of_both_runs_are_kept_in_order() -> None:
    first, second = run(1.1, pairs=4, seed=1), run(1.1, pairs=2, seed=2)
    second.foreign_load_cores, first.foreign_load_cores = 0.1, 0.7
    both = _joined(first, second)
    assert both.base_ms == first.base_ms + second.base_ms
    assert both.head_ms == first.head_ms + second.head_ms
    assert both.foreign_load_cores == 0.7
