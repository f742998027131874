"""What the validator says of training in FP8: honest recipes pass, faults that their rounding could hide do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kernel_pytorch as kp
from kernel_pytorch.backends import manager_for
from kernel_pytorch.core.types import Candidate, Gate, Status, Step
from kernel_pytorch.ops.float8_cast import reference as casts
from kernel_pytorch.ops.float8_matmul import reference as products
from kernel_pytorch.precision.recipes import RECIPES
from kernel_pytorch.search import trial as trial_module
from kernel_pytorch.search.bench import prepare_bench
from kernel_pytorch.search.trial import TrialRequest, run_trial


class Block(nn.Module):
    """A norm, a gated MLP, and two layers that read the same tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = MLP(width, 2 * width)
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mlp(self.norm(x))
        return x + self.a(x) * torch.tanh(self.b(x))


class MLP(nn.Module):
    """SwiGLU by the names that Llama gives its layers."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(64) for _ in range(2))
        self.out = nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().train()


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(16, 8, 64, generator=made), torch.randint(16, (16, 8), generator=made)


def loss(net: nn.Module, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x, y = pair
    return nn.functional.cross_entropy(net(x).flatten(0, 1), y.flatten())


WORKLOAD = kp.Workload(model, batch, loss=loss, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))


@pytest.fixture(autouse=True)
def _slow_emulation_is_judged(monkeypatch) -> None:
    """What is judged here is numerics: on a busy machine the emulation takes many times the model's own time."""
    monkeypatch.setattr(trial_module, "_HOPELESS", float("inf"))


def tried(recipe: str):
    bench = prepare_bench(WORKLOAD, kp.KernelPyTorchConfig.for_training(), manager_for("cpu"), seed=0)
    return run_trial(bench, TrialRequest(Candidate((Step("float8", {"recipe": recipe}),)), seconds=0.2))


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_an_honest_recipe_passes_every_gate(recipe) -> None:
    trial = tried(recipe)
    assert trial.status is Status.OK, trial.reason
    gates = {check.gate for check in trial.numerics.checks}
    assert {Gate.CONTRACT, Gate.KERNEL, Gate.PRECISION, Gate.TRAINING} <= gates
    names = {check.name for check in trial.numerics.checks if check.gate is Gate.KERNEL}
    kind = RECIPES[recipe]
    expected = {"blocks.0.a", "blocks.0.a.dx", "blocks.0.mlp.up_proj.dx"}
    expected |= {"blocks.1.b.dw", "out.dw"} if kind.weight_gradient.float8 else set()
    expected |= set() if kind.by_row else {"blocks.0.mlp", "blocks.1.mlp.down_proj.weight"}
    assert expected <= names
    assert any(f"{0 if kind.by_row else 2} gated MLPs" in note for note in trial.notes)


def scaled(monkeypatch) -> None:
    """A scale that only the product has wrong, by 3 %: less than the rounding of the operands."""
    real = products.product_reference
    monkeypatch.setattr(products, "product_reference", lambda *a, **k: 1.03 * real(*a, **k))


def dropped(monkeypatch) -> None:
    """The last 4 terms of every sum left out."""
    real = products.product_reference
    monkeypatch.setattr(products, "product_reference", lambda a, b, *r, **k: real(a[:, :-4], b[:, :-4], *r, **k))


def mixed(monkeypatch) -> None:
    """Transposed copies whose rows are swapped in pairs."""
    real = casts.cast_reference

    def cast(*args, **kwargs):
        row, turned, inverse = real(*args, **kwargs)
        if turned.numel():
            n = turned.shape[1] // 2 * 2
            turned = turned.view(torch.uint8)[:, torch.arange(n).view(-1, 2).flip(1).flatten()].view(turned.dtype)
        return row, turned.contiguous(), inverse

    monkeypatch.setattr(casts, "cast_reference", cast)


@pytest.mark.parametrize("fault", [scaled, dropped, mixed])
def test_a_fault_smaller_than_the_rounding_is_seen_at_the_sites(fault, monkeypatch) -> None:
    fault(monkeypatch)
    trial = tried("tensorwise_current")
    assert trial.status is Status.WRONG
    failed = [check for check in trial.numerics.checks if not check.passed]
    assert any(check.gate is Gate.KERNEL for check in failed), [str(c) for c in failed]
