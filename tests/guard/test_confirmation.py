"""A slower head is looked at again in fresh processes: what that takes back, and what it lets stand."""

from __future__ import annotations

import random

import pytest

from kernel_pytorch.core.types import Ratio, Verdict
from kernel_pytorch.guard.compare import _confirmed, _Found, _joined
from kernel_pytorch.guard.processes import SideFailed
from kernel_pytorch.guard.turns import Run


def found() -> _Found:
    return _Found(Verdict.FAIL, "the head is slower", Ratio(1.06, 1.03, 1.09), ["a note"])


def run(ratio: float, *, pairs: int = 40, noise: float = 0.01, seed: int = 0) -> Run:
    rng = random.Random(seed)
    base = [100.0 * rng.lognormvariate(0.0, noise) for _ in range(pairs)]
    return Run(tuple(base), tuple(ratio * 100.0 * rng.lognormvariate(0.0, noise) for _ in base))


@pytest.mark.parametrize("ratio", [1.03, 1.06, 2.0])
def test_what_fresh_processes_show_again_stands(ratio: float) -> None:
    seen = _confirmed(found(), run(1.06, seed=99), run(ratio), 0.03)
    assert seen.verdict is Verdict.FAIL
    assert seen.change == found().change
    assert "confirmed by" in seen.reason


@pytest.mark.parametrize("ratio", [0.9, 1.0, 1.005])
def test_what_fresh_processes_do_not_show_is_taken_back(ratio: float) -> None:
    seen = _confirmed(found(), run(1.06, seed=99), run(ratio), 0.03)
    assert seen.verdict is Verdict.INCONCLUSIVE
    assert "+6.0 %" in seen.reason
    assert "in another" in seen.reason
    assert seen.notes == ["a note"]


def confirmations(first: float, second: float, noise: float) -> float:
    """Share of runs in which a second run at one ratio confirms a first at another."""
    runs = [
        _confirmed(found(), run(first, noise=noise, seed=seed), run(second, noise=noise, seed=1000 + seed), 0.03)
        for seed in range(200)
    ]
    return sum(seen.verdict is Verdict.FAIL for seen in runs) / len(runs)


def test_the_luck_of_one_pair_of_processes_is_rarely_confirmed_by_another() -> None:
    assert confirmations(1.05, 1.0, 0.02) <= 0.05
    assert confirmations(1.2, 1.0, 0.1) <= 0.45  # noise that hides 3 %: what little fresh samples can tell


def test_a_slowdown_at_the_limit_is_confirmed_nearly_always() -> None:
    assert confirmations(1.03, 1.03, 0.02) >= 0.98
    assert confirmations(1.08, 1.05, 0.03) >= 0.98


def test_a_failure_or_too_few_samples_confirm_nothing() -> None:
    failed = run(1.1, pairs=12)
    failed.failure = SideFailed("head: died", "its last words")
    for again, why in ((failed, "died"), (run(1.1, pairs=6), "time was up")):
        seen = _confirmed(found(), run(1.06), again, 0.03)
        assert seen.verdict is Verdict.INCONCLUSIVE
        assert why in seen.reason
        assert "+6.0 %" in seen.reason
    assert any("last words" in note for note in _confirmed(found(), run(1.06), failed, 0.03).notes)


def test_samples_of_both_runs_are_kept_in_order() -> None:
    first, second = run(1.1, pairs=4, seed=1), run(1.1, pairs=2, seed=2)
    second.foreign_load_cores, first.foreign_load_cores = 0.1, 0.7
    both = _joined(first, second)
    assert both.base_ms == first.base_ms + second.base_ms
    assert both.head_ms == first.head_ms + second.head_ms
    assert both.foreign_load_cores == 0.7
