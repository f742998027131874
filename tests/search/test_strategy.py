"""The order of a search: what it tries next, given what came of what it tried."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from kernel_pytorch.core.types import Candidate, Measurement, Mode, Numerics, Ratio, Status, Step, Trial
from kernel_pytorch.search.propose import Proposals
from kernel_pytorch.search.strategy import Strategy


@dataclass(frozen=True)
class Fake:
    name: str
    group: str
    compiles: bool = False
    pays_compiled: bool = False
    pays_in_sum: bool = False
    tries_late: bool = False
    enabled_by: tuple[str, ...] = ()
    summary: str = "fake"
    numerics: Numerics = Numerics.EXACT
    modes: frozenset = frozenset(Mode)


def step(name, **params):
    return Step(name, params)


def proposals(*pairs):
    return Proposals(tuple((transform, tuple(steps)) for transform, steps in pairs), ())


def trial(candidate, speed=None, status=Status.OK, reason=""):
    if status is not Status.OK:
        return Trial(candidate, status, reason=reason, phase="screen")
    ratio = Ratio(speed, 0.999 * speed, 1.001 * speed)
    measured = Measurement(samples_ms=(1.0,) * 8, baseline_samples_ms=(speed,) * 8, ratio=ratio)
    return Trial(candidate, status, phase="screen", measurement=measured)


def run(strategy, answers, most=30):
    """Run a search whose trials end as told (by label; else at 1.0) and return the labels in order."""
    labels = []
    while len(labels) < most and (candidate := strategy.next()) is not None:
        labels.append(candidate.label)
        strategy.record(answers.get(candidate.label, lambda c: trial(c, 1.0))(candidate))
    return labels


def wrong(candidate):
    return trial(candidate, status=Status.WRONG, reason="precision: too far")


def refused(candidate):
    return trial(candidate, status=Status.FAILED, reason="CandidateError: it has a mask")


def at(speed):
    return lambda candidate: trial(candidate, speed)


def label(*steps):
    return Candidate(tuple(steps)).label


BF16, FP16 = step("dtype", to="bfloat16"), step("dtype", to="float16")
DTYPE = (Fake("dtype", "precision"), (BF16, FP16))
COMPILE = (Fake("compile", "compile", compiles=True), (step("compile"),))


def test_what_was_wrong_is_followed_by_the_next_of_its_group() -> None:
    other = step("layout")
    strategy = Strategy(proposals(DTYPE, (Fake("layout", "layout"), (other,)), COMPILE), {}, 0.02)
    order = run(strategy, {label(BF16): wrong, label(FP16): at(1.5)})
    assert order[:3] == [label(BF16), label(FP16), label(other)]
    assert order[3] == label(FP16, step("compile"))


def test_what_is_right_leaves_the_rest_of_its_group_for_later() -> None:
    other = step("layout")
    strategy = Strategy(proposals(DTYPE, (Fake("layout", "layout"), (other,)), COMPILE), {}, 0.02)
    order = run(strategy, {label(BF16): at(1.5)})
    assert order[:3] == [label(BF16), label(other), label(BF16, step("compile"))]


MASK = (Fake("mask", "mask", pays_compiled=True), (step("mask"),))
ATTENTION = (
    Fake("attention", "attention", enabled_by=("mask",)),
    (step("attention", by="a"), step("attention", by="b")),
)


def test_a_step_that_fails_alone_is_tried_with_what_enables_it_and_then_with_the_winners() -> None:
    a = step("attention", by="a")
    strategy = Strategy(proposals(MASK, ATTENTION, DTYPE, COMPILE), {}, 0.02)
    answers = {label(a): refused, label(step("mask"), a): at(1.3), label(BF16): at(1.2)}
    answers[label(step("mask"), BF16, step("compile"))] = at(1.6)
    order = run(strategy, answers)
    assert order.index(label(a)) + 1 == order.index(label(step("mask"), a))
    assert label(step("attention", by="b")) not in order[:4]
    both = label(step("mask"), a, BF16, step("compile"))
    assert both in order, order


def test_where_nothing_enables_it_the_other_steps_of_its_transform_wait() -> None:
    a, b = step("attention", by="a"), step("attention", by="b")
    strategy = Strategy(proposals(MASK, ATTENTION, DTYPE, COMPILE), {}, 0.02)
    order = run(strategy, {label(a): refused, label(step("mask"), a): refused})
    assert order[:3] == [label(a), label(step("mask"), a), label(BF16)]
    assert order.index(label(b)) > order.index(label(BF16))
    assert not any("attention(by=a)" in name and "dtype" in name for name in order)


def test_the_second_way_to_compile_takes_the_place_of_the_first_in_the_best_candidate() -> None:
    regional, whole = step("regional"), step("compile")
    dear = ((Fake("regional", "compile", compiles=True), (regional,)), COMPILE)
    one, two = step("one"), step("two")
    cheap = ((Fake("one", "one"), (one,)), (Fake("two", "two"), (two,)))
    strategy = Strategy(proposals(*cheap, *dear), {}, 0.02)
    slow = {label(one): at(1.03), label(two): at(1.02)}
    compiled = {label(one, regional): at(1.1), label(one, two, regional): at(1.2)}
    order = run(strategy, {**slow, **compiled}, most=5)
    assert order == [*slow, *compiled, label(one, two, whole)]


@pytest.mark.parametrize(("adds", "tried"), [(True, True), (False, False)])
def test_what_pays_in_sum_joins_all_winners_though_its_own_gain_is_noise(adds: bool, tried: bool) -> None:
    one, two, noise = step("one"), step("two"), step("noise")
    cheap = [(Fake("one", "one"), (one,)), (Fake("two", "two"), (two,))]
    cheap.append((Fake("noise", "noise", pays_in_sum=adds), (noise,)))
    strategy = Strategy(proposals(*cheap, COMPILE), {}, 0.02)
    answers = {
        label(one): at(1.03),
        label(two): at(1.03),
        label(noise): at(0.998),
        label(one, step("compile")): at(1.2),
    }
    order = run(strategy, answers, most=5)
    assert (label(one, two, noise, step("compile")) in order) is tried, order


def test_a_step_that_comes_along_with_compilation_is_not_there_twice() -> None:
    regional, whole, mask = step("regional"), step("compile"), step("mask")
    dear = ((Fake("regional", "compile", compiles=True), (regional,)), COMPILE)
    along = (Fake("mask", "mask", pays_compiled=True), (mask,))
    one, two = step("one"), step("two")
    cheap = ((Fake("one", "one"), (one,)), (Fake("two", "two"), (two,)))
    strategy = Strategy(proposals(along, *cheap, *dear), {}, 0.02)
    slow = {label(one): at(1.03), label(two): at(1.02)}
    compiled = {label(mask, one, regional): at(1.1), label(mask, one, two, regional): at(1.2)}
    order = run(strategy, {**slow, **compiled}, most=5)
    assert order == [*slow, *compiled, label(mask, one, two, whole)]


def test_what_is_mostly_rejected_waits_for_the_first_compilation_and_still_joins_the_best() -> None:
    small, one, whole = step("small"), step("one"), step("compile")
    cheap = ((Fake("small", "weights", tries_late=True), (small,)), (Fake("one", "one"), (one,)))
    strategy = Strategy(proposals(*cheap, COMPILE), {label(small): 4.0, label(one): 2.0}, 0.02)
    answers = {label(one): at(1.1), label(one, whole): at(1.5), label(small): at(1.3)}
    order = run(strategy, answers, most=6)
    assert order[:3] == [label(one), label(one, whole), label(small)]
    assert label(small, one, whole) in order


def test_winners_that_cannot_be_compiled_are_tried_together_without() -> None:
    bf16, packed, whole = step("dtype"), step("prepack"), step("compile")
    cheap = ((Fake("dtype", "precision"), (bf16,)), (Fake("prepack", "weights"), (packed,)))
    strategy = Strategy(proposals(*cheap, COMPILE), {}, 0.02)
    answers = {
        label(bf16): at(1.65),
        label(packed): at(1.1),
        label(bf16, whole): at(2.1),
        label(bf16, packed, whole): refused,
        label(bf16, packed): at(3.0),
    }
    assert run(strategy, answers, most=5) == [*answers]
