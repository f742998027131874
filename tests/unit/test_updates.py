"""Optimizer steps fed the same gradients: rounding passes, a wrong update does not, nothing is left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kernel_pytorch import KernelPyTorchConfig, Workload
from kernel_pytorch.core.program import begin, clone_model
from kernel_pytorch.core.types import Candidate, Mode
from kernel_pytorch.validation.gradients import gradients_of
from kernel_pytorch.validation.subject import Subject
from kernel_pytorch.validation.updates import update_check


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 4)
        self.idle = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def loss(model, x):
    return model(x).square().mean()


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def checked(optimizer, change=lambda optimizer, model: None, dtype=torch.float32, steps=4, unmodified=adamw):
    torch.manual_seed(0)
    reference = Net().to(dtype).train()
    x = torch.randn(8, 16, dtype=dtype)
    workload = Workload(Net, lambda seed: x, loss=loss, optimizer=unmodified)
    model = clone_model(reference)
    made = optimizer(model.parameters())
    change(made, model)
    program = begin(model, Mode.TRAINING, {}, optimizer=made, loss=loss)
    subject = Subject(
        workload=workload, candidate=Candidate(), config=KernelPyTorchConfig.for_training(), reference=reference,
        program=program, build=lambda *a: program, place=lambda tree: tree, structural=lambda step: True,
    )  # fmt: skip
    before = copy.deepcopy((model.state_dict(), made.state_dict()))
    check = update_check(subject, program, gradients_of(reference, loss, x, 0), steps=steps, name="update", case="main")
    for key, value in before[0].items():
        assert torch.equal(model.state_dict()[key], value)
    assert made.state_dict()["state"] == before[1]["state"] == {}
    return check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_pytorch_own_implementations_agree(how, dtype):
    check = checked(lambda ps: torch.optim.AdamW(ps, lr=1e-3, **how), dtype=dtype)
    assert check.passed, check


@pytest.mark.parametrize(
    "other",
    [
        lambda ps: torch.optim.AdamW(ps, lr=1.01e-3),
        lambda ps: torch.optim.AdamW(ps, lr=1e-3, eps=1e-4),
        lambda ps: torch.optim.AdamW(ps, lr=1e-3, betas=(0.9, 0.99)),
        lambda ps: torch.optim.Adam(ps, lr=1e-3, weight_decay=1e-2),
    ],
    ids=["learning rate", "epsilon", "beta", "decay in the gradient"],
)
def test_another_update_is_seen(other):
    assert not checked(other).passed


def test_one_element_that_drifts_is_seen():
    def drift(optimizer, model):
        def hook(*_):
            with torch.no_grad():
                model.down.weight[0, 0] *= 0.998

        optimizer.register_step_post_hook(hook)

    assert not checked(lambda ps: torch.optim.AdamW(ps, lr=1e-3), drift).passed


def test_an_optimizer_that_raises_is_told():
    def broken(optimizer, model):
        def hook(*_):
            raise RuntimeError("out of ink")

        optimizer.register_step_pre_hook(hook)

    assert "out of ink" in checked(lambda ps: torch.optim.AdamW(ps, lr=1e-3), broken).detail


def test_an_unmodified_optimizer_that_cannot_step_so_is_told():
    told = checked(torch.optim.LBFGS, unmodified=torch.optim.LBFGS)
    assert "the unmodified optimizer raises TypeError" in told
