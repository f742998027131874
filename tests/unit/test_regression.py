"""The verdicts of the guard: what they mean, what they survive, and what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from kernel_pytorch.core.types import Ratio, Verdict
from kernel_pytorch.measure.stats import dependence_bound, paired_ratio
from kernel_pytorch.validation.regression import (
    ERROR,
    MIN_PAIRS,
    Judgement,
    Sequential,
    judge_pairs,
    judge_series,
)
from kernel_pytorch.validation.spread import warm_up

SERIES = json.loads((Path(__file__).parents[2] / "benchmarks/data/h100_aa_samples.json").read_text(encoding="utf-8"))
TRAINING, LAUNCHES = (np.array(rows)[:, 0] for rows in SERIES["series"].values())


def noise(seed: int, pairs: int, cv: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    g = np.random.default_rng(seed)
    return 50.0 * np.exp(cv * g.standard_normal(pairs)), 50.0 * np.exp(cv * g.standard_normal(pairs))


@pytest.mark.parametrize(
    ("factor", "verdict", "says"),
    [
        (1.0, Verdict.PASS, "no slowdown of 3 % or more"),
        (1.03, Verdict.FAIL, "slower"),
        (1.2, Verdict.FAIL, "the head is slower: time changed by +"),
        (0.9, Verdict.PASS, "faster"),
    ],
)
def test_verdicts_of_pairs(factor: float, verdict: Verdict, says: str) -> None:
    base, head = noise(1, 80)
    judged = judge_pairs(base.tolist(), (factor * head).tolist())
    assert judged.verdict is verdict
    assert says in judged.reason
    assert judged.change.low < factor < judged.change.high
    assert judged.change.confidence == 1.0 - 2.0 * ERROR
    assert judged.max_slowdown == 0.03
    assert judged.pairs == 80


def test_a_slowdown_that_does_not_matter_passes_and_is_told() -> None:
    base, head = noise(2, 200, 0.002)
    judged = judge_pairs(base, 1.01 * head)
    assert judged.verdict is Verdict.PASS
    assert judged.change.low > 1.0
    assert "slower, by less than the 3 % that matter" in judged.reason
    assert judge_pairs(base, 1.01 * head, max_slowdown=0.01).verdict is Verdict.FAIL


def test_a_proven_slowdown_of_less_than_half_is_no_failure() -> None:
    base, head = noise(5, 40, 0.0125)
    judged = judge_pairs(base, 1.012 * head, max_slowdown=0.03)
    assert judged.verdict is not Verdict.FAIL


def test_what_is_undecided_says_how_many_pairs_would_decide() -> None:
    base, head = noise(3, 20, 0.03)
    judged = judge_pairs(base, 1.03 * head)
    assert judged.verdict is Verdict.INCONCLUSIVE
    assert "neither a slowdown that matters (3 %) nor its absence is proven in 20 pairs; about" in judged.reason
    assert judged.reason.endswith("pairs should decide")


def test_too_few_pairs() -> None:
    judged = judge_pairs([10.0] * (MIN_PAIRS - 1), [20.0] * (MIN_PAIRS - 1))
    assert judged.verdict is Verdict.INCONCLUSIVE
    assert f"at least {MIN_PAIRS} are needed" in judged.reason
    assert judge_pairs([10.0], [20.0]).verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize(("head", "verdict"), [(10.0, "PASS"), (10.3, "FAIL"), (10.5, "FAIL"), (10.1, "PASS")])
def test_times_without_noise(head: float, verdict: str) -> None:
    assert judge_pairs([10.0] * 20, [head] * 20).verdict == verdict


def test_rounded_times_do_not_look_dependent() -> None:
    g = np.random.default_rng(17)
    exact = 60.0 + 0.3 * g.standard_normal((2, 80))
    widths = []
    for base, head in (exact, np.round(exact * 2.0) / 2.0):
        judged = judge_pairs(base, head)
        assert judged.verdict is Verdict.PASS
        assert judged.notes == ()
        widths.append(judged.change.high - judged.change.low)
    assert widths[1] < 1.6 * widths[0]
    assert dependence_bound(np.zeros(80)) == dependence_bound(np.zeros(80), (np.ones(80), np.ones(80)))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_bad_times_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="the head has a time that is not a positive number"):
        judge_pairs([1.0] * 20, [1.0] * 19 + [bad])
    with pytest.raises(ValueError, match="the base has a time that is not a positive number"):
        judge_series([1.0] * 49 + [bad], [1.0] * 50)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="20 of the base and 19 of the head"):
        judge_pairs([1.0] * 20, [1.0] * 19)
    with pytest.raises(ValueError, match="20 of the base and 19 of the head"):
        Sequential(0.03, 40).look([1.0] * 20, [1.0] * 19)
    with pytest.raises(ValueError, match="no times"):
        judge_series([], [1.0])
    for slowdown in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="max_slowdown"):
            judge_pairs([1.0] * 20, [1.0] * 20, max_slowdown=slowdown)
        with pytest.raises(ValueError, match="max_slowdown"):
            Sequential(slowdown, 100)
    with pytest.raises(ValueError, match="max_pairs"):
        Sequential(0.03, 0)


@pytest.mark.parametrize("where", [slice(0, 4), slice(10, 14), slice(36, 40)])
def test_outliers_of_one_side_make_no_verdict(where: slice) -> None:
    base, head = noise(4, 40)
    head[where] *= 5.0
    assert judge_pairs(base, head).verdict is Verdict.PASS
    assert judge_pairs(base, 1.05 * head).verdict is Verdict.FAIL
    assert judge_pairs(head, base).verdict is Verdict.PASS


def test_a_warm_up_is_left_out_on_both_sides_by_one_rule() -> None:
    base, head = noise(6, 60)
    base[:2] *= 30.0
    head[:7] *= np.linspace(3.0, 1.2, 7)
    assert warm_up(base, head) == warm_up(head, base) == 7
    judged = judge_pairs(base, head)
    assert judged.verdict is Verdict.PASS
    assert judged.pairs == 53
    assert "the first 7 samples of both sides are left out as a warm-up" in judged.notes[0]
    assert warm_up(*noise(7, 60)) == 0


def test_a_warm_up_takes_no_more_than_a_quarter() -> None:
    base, head = noise(6, 40)
    head[:15] *= 2.0
    assert warm_up(base, head) == 10


def test_ten_pairs_stay_ten() -> None:
    base, head = noise(6, 12, 0.001)
    head[:4] *= 2.0
    assert judge_pairs(base, head).pairs == 10


def test_only_noisier_is_named() -> None:
    base, _ = noise(8, 100)
    _, head = noise(9, 100, 0.03)
    judged = judge_pairs(base, head)
    assert judged.verdict is not Verdict.FAIL
    assert any(note.startswith("the head is only noisier, not slower") for note in judged.notes)
    assert not any("noisier" in note for note in judge_pairs(head, base).notes)
    assert any("less noisy" in note for note in judge_pairs(head, base).notes)
    slower = judge_pairs(base, 1.2 * head)
    assert slower.verdict is Verdict.FAIL
    assert any("also noisier" in note for note in slower.notes)


def test_rare_slow_steps_are_named_with_what_they_do_to_the_mean() -> None:
    base, head = noise(10, 200)
    head[5::15] *= 2.0
    judged = judge_pairs(base, head)
    assert judged.verdict is Verdict.PASS
    note = next(note for note in judged.notes if "noisier" in note)
    assert "not slower in its typical step" in note
    assert "13 of 200 samples of the head" in note
    assert "the mean changed by +" in note


def test_a_trend_of_the_difference_is_named() -> None:
    base, head = noise(11, 60)
    judged = judge_pairs(base, head * np.linspace(1.0, 1.2, 60))
    assert any("the difference moves while they run" in note for note in judged.notes)
    assert any("neighbouring pairs resemble each other" in note for note in judged.notes)
    common = np.linspace(1.0, 1.5, 60)
    assert judge_pairs(base * common, head * common).notes == ()


def test_quiet_pairs_have_nothing_to_note() -> None:
    noted = sum(bool(judge_pairs(*noise(seed, 40)).notes) for seed in range(100, 200))
    assert noted <= 3


def test_looks_come_when_they_are_due_and_only_once() -> None:
    judge = Sequential(0.03, 100)
    assert judge.looks[0] == 16
    assert judge.looks[-1] < 100
    base, head = noise(12, 100, 0.2)
    taken: list[Judgement | None] = []
    for pairs in range(2, 100, 2):
        taken.append(judge.look(base[:pairs], head[:pairs]))
    assert taken == [None] * 49
    final = judge.look(base, head)
    assert final is not None
    assert final.verdict is Verdict.INCONCLUSIVE
    assert Sequential(0.03, 100).look(base[:30], head[:30], last=True) is not None


def test_sequential_stops_early_where_it_is_certain() -> None:
    for factor, verdict in ((1.0, Verdict.PASS), (1.1, Verdict.FAIL), (0.8, Verdict.PASS)):
        base, head = noise(13, 200, 0.005)
        judge = Sequential(0.03, 200)
        for pairs in range(2, 201, 2):
            judged = judge.look(base[:pairs], factor * head[:pairs])
            if judged is not None:
                break
        assert judged is not None
        assert judged.verdict is verdict
        assert judged.pairs <= 24


def test_the_looks_spend_no_more_error_than_there_is() -> None:
    for most in (1, 10, 16, 17, 40, 200, 5000):
        judge = Sequential(0.03, most)
        base, head = noise(14, max(most, MIN_PAIRS))
        last = judge.last(base, head).change.confidence
        spent = len(judge.looks) * (1.0 - judge.early_confidence) + (1.0 - last)
        assert spent <= 2.0 * ERROR * (1.0 + 1e-9)


def test_stop_of_a_sampler_is_the_verdict_of_the_look() -> None:
    judge = Sequential(0.03, 200)
    assert judge.stop(Ratio(1.0, 0.99, 1.01))  # at most 1 % slower
    assert judge.stop(Ratio(0.9, 0.85, 0.95))  # at least 5 % slower
    assert judge.stop(Ratio(1.2, 1.1, 1.3))
    assert not judge.stop(Ratio(0.98, 0.95, 1.01))
    assert not judge.stop(Ratio(0.99, 0.965, 0.999))  # slower, by too little
    assert not judge.stop(Ratio(1.0, 0.0, math.inf))


@pytest.mark.parametrize("seed", range(5))
def test_the_training_series_in_turns(seed: int) -> None:
    start = 30 * seed
    base, head = TRAINING[start : start + 80 : 2], TRAINING[start + 1 : start + 80 : 2]
    assert judge_pairs(base, head).verdict is Verdict.PASS
    assert judge_pairs(base, 1.03 * head).verdict is Verdict.FAIL


def test_the_launch_bound_series_in_turns() -> None:
    base, head = LAUNCHES[::2], LAUNCHES[1::2]
    for one, other in ((base, head), (head, base)):
        assert judge_pairs(one, other, max_slowdown=0.1).verdict is Verdict.PASS
        assert judge_pairs(one, 1.1 * other).verdict is Verdict.FAIL
        assert judge_pairs(one, 1.1 * other, max_slowdown=0.1).verdict is Verdict.FAIL


def test_series_apart_are_undecided_and_told_how_to_be_taken() -> None:
    for one in (TRAINING, LAUNCHES):
        half = len(one) // 2
        judged = judge_series(one[:half], one[half:])
        assert judged.verdict is Verdict.INCONCLUSIVE
        assert "not taken side by side" in judged.reason
        assert "--paired" in judged.reason
    assert judge_series(LAUNCHES[:100], 1.1 * LAUNCHES[100:]).verdict is Verdict.INCONCLUSIVE


def test_series_apart_of_a_steady_device_decide() -> None:
    base, head = noise(15, 200, 0.003)
    for factor, verdict in ((1.0, Verdict.PASS), (1.2, Verdict.FAIL), (0.8, Verdict.PASS)):
        judged = judge_series(base, factor * head[:150])
        assert judged.verdict is verdict
        assert "may be drift" in judged.reason
    assert judge_series(TRAINING[:125], 1.3 * TRAINING[125:]).verdict is Verdict.FAIL


def test_series_apart_with_a_trend_never_decide() -> None:
    base, head = noise(16, 100, 0.003)
    rising = np.linspace(1.0, 1.02, 100)
    judged = judge_series(base * rising, 1.5 * head)
    assert judged.verdict is Verdict.INCONCLUSIVE
    assert "trend" in judged.reason
    assert judged.change.high == math.inf


def test_short_series_apart_do_not_decide() -> None:
    judged = judge_series([10.0] * 39, [20.0] * 60)
    assert judged.verdict is Verdict.INCONCLUSIVE
    assert "39 samples are too few" in judged.reason
    assert judged.change.value == 2.0


def test_dependence_is_bounded_from_above() -> None:
    g = np.random.default_rng(0)
    steps = g.standard_normal(400)
    memory = np.convolve(steps, 0.8 ** np.arange(40))[:400]
    alone = dependence_bound(memory)
    assert alone > 2.5  # in truth 3
    assert 1.0 <= dependence_bound(steps) < 1.4
    # Sides that have nothing in common depend no less than their difference; a common level is no dependence of it.
    assert dependence_bound(memory, (memory, steps)) > 2.0
    assert dependence_bound(steps, (memory + steps, memory)) < 1.4
    assert dependence_bound(memory[:5]) == 1.0


def test_many_values_have_the_same_interval_as_few() -> None:
    g = np.random.default_rng(3)
    base, head = np.exp(0.01 * g.standard_t(3, (2, 501)))
    exact = np.log(base) - np.log(head)
    rows, columns = np.triu_indices(501)
    walsh = np.sort((exact[rows] + exact[columns]) / 2.0)
    ratio = paired_ratio(base.tolist(), head.tolist(), dependence=lambda deviations: 1.0)
    assert math.log(ratio.value) == pytest.approx(float(np.median(walsh)), abs=1e-12)
    ranks = [int(np.searchsorted(walsh, math.log(x) + sign * 1e-10)) for x, sign in ((ratio.low, -1), (ratio.high, 1))]
    assert ranks[0] + ranks[1] == pytest.approx(walsh.size, abs=2)
