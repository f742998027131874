"""The strategy tries cheap steps first, builds on what won, and prunes what cannot help."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from kernel_pytorch.core.types import Candidate, Measurement, Mode, Numerics, Ratio, Status, Step, Trial
from kernel_pytorch.search.propose import Proposals
from kernel_pytorch.search.strategy import Strategy


@dataclass
class Fake:
    name: str
    group: str
    compiles: bool = False
    summary: str = "fake"
    numerics: Numerics = Numerics.EXACT
    modes: frozenset = field(default_factory=lambda: frozenset(Mode))


def step(name: str) -> Step:
    return Step(name)


def trial(candidate: Candidate, ratio: float, status: Status = Status.OK) -> Trial:
    r = Ratio(ratio, ratio * 0.99, ratio * 1.01)
    m = Measurement((1.0,), (ratio,), r) if status is Status.OK else None
    return Trial(candidate, status, measurement=m)


def proposals() -> Proposals:
    fakes = [
        Fake("layout", "layout"),
        Fake("half", "precision"),
        Fake("int8", "precision"),
        Fake("compile", "compile", True),
    ]
    return Proposals(tuple((f, (Step(f.name),)) for f in fakes), ())


def drive(strategy: Strategy, ratios: dict[str, float], wrong: tuple[str, ...] = ()) -> list[str]:
    tried = []
    while (c := strategy.next()) is not None and len(tried) < 50:
        tried.append(c.label)
        value = 1.0
        for s in c.steps:
            value *= ratios.get(s.transform, 1.0)
        bad = any(s.transform in wrong for s in c.steps)
        strategy.record(trial(c, value, Status.WRONG if bad else Status.OK))
    return tried


def test_cheap_steps_come_first_and_compile_is_tried_on_the_best_of_them():
    tried = drive(Strategy(proposals(), {"half": 3.0, "int8": 2.0}, 0.02), {"half": 2.0, "int8": 1.5, "compile": 1.2})
    assert set(tried[:2]) == {"layout", "half"}, "the most promising of each group"
    assert tried[2] == "half + compile"
    assert tried[3] == "int8"


def test_a_step_that_was_wrong_alone_is_not_combined():
    strategy = Strategy(proposals(), {}, 0.02)
    tried = drive(strategy, {"half": 2.0, "int8": 9.0, "compile": 1.2}, wrong=("int8",))
    assert "int8" in tried
    assert not any("int8 +" in t or "+ int8" in t for t in tried)
    reasons = {u.candidate.label: u.reason for u in strategy.untried("budget")}
    assert "int8 alone was wrong" in reasons.values()


def test_what_cannot_reach_the_smallest_gain_is_pruned_and_said():
    strategy = Strategy(proposals(), {"layout": 1.001}, 0.02)
    tried = drive(strategy, {"half": 2.0})
    assert "layout" not in tried
    assert {u.candidate.label: u.reason for u in strategy.untried("budget")}["layout"] == "predicted to gain at most 1x"


def test_steps_of_one_group_are_never_together():
    tried = drive(Strategy(proposals(), {}, 0.02), {"half": 2.0, "int8": 2.1, "compile": 1.3, "layout": 1.1})
    assert not any("half" in t and "int8" in t for t in tried)
    assert "layout + int8 + compile" in tried


def test_nothing_wins_still_tries_compile_alone():
    tried = drive(Strategy(proposals(), {}, 0.02), {})
    assert "compile" in tried


def test_untried_says_the_budget_for_what_was_not_reached():
    strategy = Strategy(proposals(), {}, 0.02)
    strategy.record(trial(Candidate((step("half"),)), 2.0))
    reasons = {u.candidate.label: u.reason for u in strategy.untried("the budget of 1 s was spent")}
    assert reasons["half + compile"] == "the budget of 1 s was spent"
    assert "half" not in reasons


def test_the_bounds_of_steps_add_as_shares_of_the_time():
    strategy = Strategy(proposals(), {"layout": 2.0, "compile": 1.25}, 0.02)
    both = Candidate((Step("layout"), Step("compile")))
    assert strategy._ceiling(both) == pytest.approx(1 / (1 - 0.5 - 0.2))
    assert strategy._ceiling(Candidate((Step("layout"), Step("half")))) == float("inf")


def test_what_pays_inside_compiled_code_only_comes_with_compile_and_is_left_out_where_it_spoils():
    mask = Fake("mask", "mask")
    mask.pays_compiled = True
    known = proposals()
    both = Proposals((*known.steps, (mask, (Step("mask"),))), ())
    tried = drive(Strategy(both, {}, 0.02), {"half": 2.0, "compile": 1.2})
    assert tried.index("mask") > tried.index("half + compile + mask")
    assert "half + compile" not in tried
    tried = drive(Strategy(both, {}, 0.02), {"half": 2.0, "compile": 1.2}, wrong=("mask",))
    assert tried.index("half + compile") == tried.index("half + compile + mask") + 1
    assert "layout + half + compile + mask" not in tried


def test_winners_are_tried_together_and_compiled_before_other_cheap_steps():
    ceilings = {"half": 3.0, "int8": 2.0}
    tried = drive(Strategy(proposals(), ceilings, 0.02), {"half": 2.0, "layout": 1.1, "int8": 1.2})
    assert tried.index("layout + half") < tried.index("int8")
    assert tried.index("layout + half + compile") < tried.index("int8")


def test_winners_are_tried_together_before_one_by_one():
    fakes = [Fake("one", "a"), Fake("two", "b"), Fake("three", "c"), Fake("compile", "compile", True)]
    strategy = Strategy(Proposals(tuple((f, (Step(f.name),)) for f in fakes), ()), {}, 0.02)
    tried = drive(strategy, {"one": 1.3, "two": 1.2, "three": 1.1, "compile": 1.5})
    together = tried.index("one + two + three + compile")
    assert together == 4, "after the single steps and compilation of the best"
    assert all(tried.index(c) > together for c in tried if c.count("+") == 2)
