"""A search ends in a plan whatever its candidates do: they win, lose, lie, crash, hang or eat the memory."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from kernel_pytorch import Case, KernelPyTorchConfig, UnifiedManager, Workload
from kernel_pytorch.core.types import Status
from kernel_pytorch.errors import KptError

from .planted import Planted, Sleepy, sleepy_inputs

WORKLOAD = Workload(Sleepy, sleepy_inputs, name="sleepy")


def search(*transforms, **changes):
    config = KernelPyTorchConfig(**{"budget_s": 60.0, **changes})
    return UnifiedManager(config, transforms).optimize(WORKLOAD)


def by_label(plan):
    return {t.candidate.label: t for t in plan.evidence if t.phase == "screen"}


DEADLY = {
    "segfault": (Status.FAILED, "SIGSEGV"),
    "kill": (Status.OOM, "SIGKILL"),
    "raise": (Status.FAILED, "the layer is on fire"),
    "hang": (Status.TIMEOUT, ""),
    "eat": (Status.OOM, ""),
}


@pytest.fixture(scope="module")
def in_processes():
    """One search in processes of their own: its first candidates die, one way each, and it goes on."""
    deadly = (Planted(what, what) for what in DEADLY)
    limits = {"trial_timeout_s": 12.0, "memory_limit_bytes": 2 * 1024**3, "budget_s": 120.0, "isolation": "process"}
    return search(*deadly, Planted("faster", "faster"), Planted("slower", "slower"), **limits)


@pytest.fixture(scope="module")
def here():
    """One search in this process: its candidates do what a search must see through, or are excluded."""
    planted = [Planted(what, what) for what in ("wrong", "crawl", "faster", "slower")]
    return search(*planted, Planted("excluded", "faster"), exclude=("excluded",), isolation="none")


@pytest.mark.parametrize("isolation", ["process", "none"])
def test_the_faster_is_chosen_and_confirmed_on_fresh_samples(isolation, request):
    result = request.getfixturevalue("in_processes" if isolation == "process" else "here")
    plan = result.plan
    assert plan.candidate.label == "faster"
    assert plan.chosen.phase == "confirm"
    assert plan.chosen.measurement.ratio.low > 1.3
    assert {t.isolation for t in plan.evidence} == {isolation}
    assert by_label(plan)["slower"].reason == "slower than the unmodified model"
    x = sleepy_inputs(3)
    with torch.no_grad():
        assert torch.equal(result.model(x), result.original(x))
    assert result.original.delay_ms == 4.0


def test_a_wrong_candidate_never_wins_however_fast(here):
    assert here.plan.candidate.label == "faster", "the wrong one takes no time at all"
    trial = by_label(here.plan)["wrong"]
    assert trial.status is Status.WRONG
    assert trial.measurement is None, "no time is printed on red"


@pytest.mark.parametrize("what", DEADLY)
def test_a_trial_that_dies_is_a_trial_and_the_search_goes_on(in_processes, what):
    plan, (status, word) = in_processes.plan, DEADLY[what]
    trial = by_label(plan)[what]
    assert trial.status in {status, Status.FAILED} if what == "kill" else trial.status is status
    assert word in trial.reason
    assert "\n" not in trial.reason
    order = list(by_label(plan))
    assert order.index(what) < order.index("faster"), "the search went on after it"
    assert plan.candidate.label == "faster"


def test_an_unknown_transform_is_misuse():
    with pytest.raises(KptError, match="nosuch"):
        search(Planted("faster", "faster"), only=("nosuch",))


def test_what_was_excluded_is_not_tried(here):
    tried = {step.transform for trial in here.plan.evidence for step in trial.candidate.steps}
    assert tried == {"wrong", "crawl", "faster", "slower"}


@pytest.mark.serial
def test_the_budget_is_kept_and_what_was_not_tried_is_said():
    transforms = [Planted(f"slow_{i}", "slower") for i in range(40)]
    plan = search(*transforms, budget_s=5.0).plan
    assert plan.search_seconds < 15.0
    assert any("budget" in u.reason for u in plan.untried)


@pytest.mark.serial
def test_a_mix_of_shapes_is_weighted():
    mix = {
        "small": Case(lambda seed: torch.ones(2, 16), weight=3.0),
        "large": Case(lambda seed: torch.ones(32, 16), weight=1.0),
    }
    config = KernelPyTorchConfig(budget_s=25.0, isolation="none")
    plan = UnifiedManager(config, (Planted("faster", "faster"),)).optimize(Workload(Sleepy, mix)).plan
    assert plan.workload.weights == {"small": 0.75, "large": 0.25}
    assert plan.candidate.label == "faster"
    assert plan.chosen.measurement.baseline_median_ms == pytest.approx(4.0, rel=0.5)


class Unseeded(nn.Module):
    """Other weights each time it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16) * time.time_ns() % 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_a_factory_that_gives_other_weights_each_time_does_not_fail_its_candidates():
    config = KernelPyTorchConfig(budget_s=60.0, isolation="none")
    plan = UnifiedManager(config, (Planted("same"), Planted("other"))).optimize(Workload(Unseeded, sleepy_inputs)).plan
    assert {t.status for t in plan.evidence} == {Status.OK}


def test_a_nan_in_the_calls_before_validation_is_seen():
    mix = {"a": Case(sleepy_inputs), "b": Case(sleepy_inputs)}
    config = KernelPyTorchConfig(budget_s=60.0, isolation="none")
    plan = UnifiedManager(config, (Planted("nan", "nan"),)).optimize(Workload(Sleepy, mix)).plan
    assert by_label(plan)["nan"].status is Status.WRONG
    assert "NaN" in by_label(plan)["nan"].reason


def test_what_crawls_is_not_judged(here):
    trial = by_label(here.plan)["crawl"]
    assert trial.status is Status.FAILED
    assert "times the original" in trial.reason
