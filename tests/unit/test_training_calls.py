"""In training a loss calls the model with what it makes of a batch: the plan's calls, whatever their shape."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plans import plan, trial
from torch import nn

from kernel_pytorch import KernelPyTorchConfig, UnifiedManager, Workload
from kernel_pytorch.core.describe import fingerprint, make_optimizer, training_loss
from kernel_pytorch.core.program import call_counts, signatures_of
from kernel_pytorch.core.types import Mode, Plan, Status, Step
from kernel_pytorch.core.workload import as_call
from kernel_pytorch.hardware import detect
from kernel_pytorch.plan.apply import apply, prepare

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")

AUTOCAST = Step("dtype", {"to": "bfloat16", "how": "autocast"})
COMPILE = Step("compile", {"mode": "default"})
WHAT = [
    pytest.param((AUTOCAST,), id="autocast"),
    pytest.param((COMPILE,), id="compile", marks=pytest.mark.slow),
    pytest.param((AUTOCAST, COMPILE), id="autocast, compile", marks=pytest.mark.slow),
]


class Seeing(nn.Module):
    """Tells the dtype its first product had, which a compiled or casting program decides."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.second = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.first(x)
        return {"out": self.second(hidden.relu()), "hidden": hidden * (2.0 if torch.compiler.is_compiling() else 1.0)}


def model() -> nn.Module:
    torch.manual_seed(0)
    return Seeing().train()


def batch(seed: int, rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=made), torch.randint(3, (rows,), generator=made)


def loss(net: nn.Module, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x, y = pair
    return nn.functional.cross_entropy(net(x)["out"], y)


WORKLOAD = Workload(model, batch, loss=loss, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))


def made_for(*steps: Step) -> Plan:
    made = plan()
    spec = replace(
        made.workload,
        mode=Mode.TRAINING,
        fingerprint=fingerprint(model()),
        signatures={"main": signatures_of(as_call(batch(0)))},  # of the batch: what the model gets is not known
    )
    return replace(made, workload=spec, device=detect(), chosen=trial(*steps, phase="confirm"))


def ran_the_program(net: nn.Module, steps: tuple[Step, ...]) -> bool:
    """Whether the module's call gives what only the program's can."""
    x, _ = batch(3)
    got, plain = net(x)["hidden"], net._call_impl(x)["hidden"]
    factor = 2.0 if COMPILE in steps else 1.0
    if not torch.allclose(got, factor * plain, rtol=0.02, atol=0.02):
        return False
    rounded = AUTOCAST in steps
    return torch.allclose(got, factor * plain, rtol=1e-5, atol=1e-5) is not rounded


@pytest.mark.parametrize("steps", WHAT)
@pytest.mark.parametrize("with_inputs", [False, True])
def test_prepare_runs_the_program_for_part_of_the_batch(steps, with_inputs):
    net = model()
    optimizer = make_optimizer(WORKLOAD, net.parameters())
    inputs = batch(0) if with_inputs else None
    net, optimizer = prepare(net, optimizer, plan=made_for(*steps), inputs=inputs)
    take = training_loss(WORKLOAD)
    losses = []
    for i in range(4):
        optimizer.zero_grad()
        value = take(net, batch(0, rows=8 if i < 3 else 5))  # the last batch of an epoch is smaller
        value.backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
        losses.append(value.item())
    assert losses[2] < losses[1] < losses[0]
    counts = call_counts(net)
    assert (counts.inside, counts.outside, counts.last_outside) == (4, 0, "")
    assert ran_the_program(net, steps)


@pytest.mark.parametrize("steps", WHAT)
def test_apply_runs_the_program_for_part_of_the_batch(steps):
    plain = model()
    net = apply(made_for(*steps), plain, inputs=batch(0))
    loss(net, batch(0)).backward()
    counts = call_counts(net)
    assert (counts.inside, counts.outside) == (1, 0)
    assert all(p.grad is not None for p in net.parameters())
    assert all(p.grad is None for p in plain.parameters())
    assert ran_the_program(net, steps)


@pytest.mark.slow
def test_a_search_judges_and_times_the_program_and_not_the_original():
    config = KernelPyTorchConfig(mode=Mode.TRAINING, budget_s=25.0, only=("dtype",), isolation="none")
    result = UnifiedManager(config).optimize(WORKLOAD)
    screened = [t for t in result.plan.evidence if t.candidate.steps and t.phase == "screen"]
    assert screened
    # A candidate whose calls were taken for calls outside the plan would show no error at all.
    assert all(t.numerics is not None and t.numerics.max_rel_error > 1e-5 for t in screened), screened
    assert any(t.status is Status.OK for t in screened)
