"""What the first calls of a candidate show that later ones do not, and what a trial says of its time."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn

from kernel_pytorch import KernelPyTorchConfig, Workload
from kernel_pytorch.backends import manager_for
from kernel_pytorch.core.types import Candidate, Status
from kernel_pytorch.search.bench import build, prepare_bench
from kernel_pytorch.search.trial import TrialRequest, run_trial


class FirstGradientIs(torch.autograd.Function):
    """Passes its input on; its first gradient is multiplied by a number, later ones are left alone."""

    factors: ClassVar[list[float]] = []

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * (FirstGradientIs.factors.pop() if FirstGradientIs.factors else 1.0)


@pytest.mark.parametrize(
    ("factor", "status"), [(float("nan"), Status.WRONG), (float("inf"), Status.WRONG), (1.0, Status.OK)]
)
def test_gradients_of_the_first_step_must_be_finite(factor, status):
    workload = Workload(
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)),
        lambda seed: torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)),
        loss=lambda model, x: model(x).square().mean(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    )
    bench = prepare_bench(workload, KernelPyTorchConfig.for_training(), manager_for("cpu"), seed=0)
    FirstGradientIs.factors = [factor]

    def make(model):
        program = build(bench, model, Candidate())
        call = program.call
        program.call = lambda x: FirstGradientIs.apply(call(x))
        return program

    trial = run_trial(bench, TrialRequest(Candidate(), seconds=0.2, level="quick"), make)
    assert trial.status is status, trial.reason
    if status is Status.WRONG:
        assert "4 gradients of the first calls" in trial.reason
    else:
        assert set(trial.spent_s) == {"apply", "first_calls", "judge", "measure"}
        assert sum(trial.spent_s.values()) <= trial.seconds
