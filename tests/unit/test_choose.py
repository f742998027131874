"""The choice: the fastest that is right; a tie goes to the simpler; nothing is kept that fresh samples deny."""

from __future__ import annotations

import numpy as np
import pytest

from kernel_pytorch.core.types import Candidate, Measurement, Ratio, Status, Step, Trial
from kernel_pytorch.search.choose import finalists, is_confirmed, why_not

A, B, AB = Candidate((Step("a"),)), Candidate((Step("b"),)), Candidate((Step("a"), Step("b")))


def trial(candidate, value, *, low=None, high=None, status=Status.OK, phase="screen"):
    ratio = Ratio(value, value * 0.99 if low is None else low, value * 1.01 if high is None else high)
    return Trial(candidate, status, phase=phase, measurement=Measurement((1.0,), (value,), ratio))


def test_the_fastest_comes_first():
    assert [t.candidate for t in finalists([trial(A, 1.5), trial(B, 2.0)], 0.02)] == [B, A]


def test_a_tie_goes_to_fewer_steps():
    assert finalists([trial(A, 1.99), trial(AB, 2.0)], 0.02)[0].candidate == A
    assert finalists([trial(A, 1.90), trial(AB, 2.0)], 0.02)[0].candidate == AB


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.OK])
def test_what_is_not_ok_is_never_a_finalist(status):
    assert finalists([trial(A, 9.0, status=status)], 0.02) == []


def test_the_unmodified_model_and_losers_are_no_finalists():
    assert finalists([trial(Candidate(), 1.5), trial(A, 0.9), trial(B, 1.0)], 0.02) == []


def measured(ratio: float, noise: float, n: int = 40, status=Status.OK):
    rng = np.random.default_rng(0)
    base = tuple(rng.lognormal(0.0, noise, n))
    ours = tuple(b / ratio * e for b, e in zip(base, rng.lognormal(0.0, noise, n), strict=True))
    return Trial(A, status, phase="confirm", measurement=Measurement(ours, base, Ratio(ratio, ratio, ratio)))


def test_confirmation_needs_both_a_gain_and_significance():
    assert is_confirmed(measured(1.10, 0.01), 0.02)
    assert not is_confirmed(measured(1.10, 0.50), 0.02)
    assert not is_confirmed(measured(1.01, 0.0001), 0.02)
    assert not is_confirmed(measured(2.0, 0.01, status=Status.WRONG), 0.02)


def test_every_loser_has_a_reason_in_words():
    assert "slower than the unmodified" in why_not(trial(A, 0.5), B, 0.02)
    assert "noise" in why_not(trial(A, 1.01, low=0.99), B, 0.02)
    assert (
        why_not(trial(A, 1.5), B, 0.02, Ratio(3.0, 2.97, 3.03)) == "100% slower than the choice when both were screened"
    )
    assert "ties with the choice" in why_not(trial(AB, 3.0), B, 0.02, Ratio(3.0, 2.97, 3.03))
    assert "not confirmed" in why_not(trial(A, 1.5), Candidate(), 0.02)
    assert why_not(trial(B, 1.5), B, 0.02) == ""
