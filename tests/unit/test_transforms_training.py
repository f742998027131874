"""Steps of a training program: the user's parameters and optimizer stay theirs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kernel_pytorch.catalog import apply_candidate, find
from kernel_pytorch.core.program import begin, restore, ship
from kernel_pytorch.core.types import Candidate, Mode, Step
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError

FUSED = Step("fused_optimizer", {"implementation": "fused"})
KINDS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for i in range(steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def pair(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    return model, KINDS[kind](model.parameters())


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize("kind", KINDS)
def test_another_implementation_takes_over_a_running_optimizer(kind: str, implementation: str) -> None:
    plain, plain_optimizer = pair(kind)
    model, optimizer = pair(kind)
    train(plain, plain_optimizer, 3)
    train(model, optimizer, 3)
    flags = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    program = begin(model, Mode.TRAINING, {"main": Call((torch.ones(1, 4),))}, optimizer=optimizer)
    step = Step("fused_optimizer", {"implementation": implementation})
    shipped = ship(apply_candidate(program, Candidate((step,))), model)
    assert all(g[implementation] for g in optimizer.param_groups)
    train(plain, plain_optimizer, 3)
    train(shipped, optimizer, 3)
    for a, b in zip(plain.parameters(), shipped.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    restore(shipped)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == flags
    assert "_step_supports_amp_scaling" not in vars(optimizer)
    train(plain, plain_optimizer, 2)
    train(shipped, optimizer, 2)
    for a, b in zip(plain.parameters(), shipped.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_ejected_source_fuses_the_optimizer() -> None:
    _, optimizer = pair("adamw")
    exec(find("fused_optimizer").source(FUSED), {"optimizer": optimizer})
    assert optimizer.param_groups[0]["fused"] is True


def test_an_optimizer_that_cannot_be_fused_is_told() -> None:
    model, _ = pair("sgd")
    for optimizer, words in (
        (torch.optim.LBFGS(model.parameters()), "LBFGS is not one of"),
        (torch.optim.AdamW(model.parameters(), fused=True), "fused already"),
        (None, "NoneType"),
    ):
        program = begin(model, Mode.TRAINING, {"main": Call((torch.ones(1, 4),))}, optimizer=optimizer)
        with pytest.raises(CandidateError, match=words):
            apply_candidate(program, Candidate((FUSED,)))


def test_channels_last_undone_after_training_keeps_the_trained_values() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(2, 3, 8, 8)
    model(x)
    twin = copy.deepcopy(model)
    optimizer, other = KINDS["adamw"](model.parameters()), KINDS["adamw"](twin.parameters())
    program = begin(model, Mode.TRAINING, {"main": Call((x,))}, optimizer=optimizer)
    shipped = ship(apply_candidate(program, Candidate((Step("channels_last"),))), model)
    assert shipped[0].weight.is_contiguous(memory_format=torch.channels_last)
    for net, update in ((shipped, optimizer), (twin, other)):
        for _ in range(3):
            update.zero_grad()
            net(x).square().mean().backward()
            update.step()
    restore(shipped)
    assert shipped[0].weight.is_contiguous()
    assert torch.allclose(shipped[0].weight, twin[0].weight, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_autocast_and_compile_train_as_the_plain_model_does() -> None:
    plain, plain_optimizer = pair("adamw")
    model, optimizer = pair("adamw")
    call = Call((torch.ones(8, 4),))
    steps = (Step("dtype", {"to": "bfloat16", "how": "autocast"}), Step("compile", {"mode": "default"}), FUSED)
    program = begin(model, Mode.TRAINING, {"main": call}, optimizer=optimizer)
    shipped = ship(apply_candidate(program, Candidate(steps)), model)
    train(plain, plain_optimizer, 5)
    train(shipped, optimizer, 5)
    for a, b in zip(plain.parameters(), shipped.parameters(), strict=True):
        assert a.dtype == b.dtype
        assert torch.allclose(a, b, atol=1e-2)
