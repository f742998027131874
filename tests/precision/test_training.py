"""What trainings do around FP8 layers: clipping, frozen layers, adapters, tied weights, checkpoints, fallbacks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import kernel_pytorch as kp
from kernel_pytorch.errors import ModelError
from kernel_pytorch.precision.mlp import MLP_SLOT
from kernel_pytorch.precision.recipes import RECIPES
from kernel_pytorch.precision.site import site_of

from .models import Block, batches, block


class Adapted(nn.Module):
    """A linear layer that stays as it is, and a product of two small ones that learns (Hu et al., arXiv:2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def adapted(recipe: str | None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(nn.Linear(32, 64)), nn.GELU(), Adapted(nn.Linear(64, 32)))
    return model if recipe is None else kp.precision.convert(model, recipe)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_adapters_learn_on_a_frozen_base(recipe) -> None:
    model, plain = adapted(recipe), adapted(None)
    told = {layer.path: layer for layer in kp.precision.report(model).layers}
    assert told["0.base"].recipe == recipe
    assert "16 does not divide" in told["0.down"].reason  # rank 4
    data, losses = batches(1), []
    for one in (model, plain):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2)
        history = []
        for _ in range(40):
            loss = nn.functional.mse_loss(one(data[0][0]), data[0][1])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(float(loss.detach()))
        losses.append(history)
    mine, theirs = losses
    assert theirs[-1] < 0.5 * theirs[0]
    assert mine[-1] == pytest.approx(theirs[-1], rel=0.15)
    assert all(p.grad is None for n, p in model.named_parameters() if "base" in n)
    site = site_of(model[0].base)
    assert site is not None
    # A frozen weight is cast once for good: its history never moves.
    assert not site.states or float(site.states["weight"][0]) == 0.0


def test_clipping_scales_the_gradients_that_are_there() -> None:
    model = block("tensorwise_delayed")
    x, target = batches(1)[0]
    nn.functional.mse_loss(model(x * 100), target).backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert norm > 1.0
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, before[name] * (0.1 / (norm + 1e-6)), rtol=1e-5)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_checkpointed_run_is_the_same_run(recipe) -> None:
    models = [block(recipe) for _ in range(2)]
    losses: list[list[float]] = []
    for model, recomputed in zip(models, (False, True), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        history = []
        for x, target in batches(5):
            leaf = x.clone().requires_grad_()
            y = checkpoint(model, leaf, use_reentrant=False) if recomputed else model(leaf)
            loss = nn.functional.mse_loss(y, target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(float(loss.detach()))
        losses.append(history)
    assert losses[0] == losses[1]


def test_frozen_layers_stay_and_the_others_learn() -> None:
    model = Block()
    model.mlp.requires_grad_(False)
    frozen = copy.deepcopy(model.mlp.state_dict())
    kp.precision.convert(model, "tensorwise_delayed", example_inputs=(torch.randn(4, 32),))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = model.query.weight.detach().clone()
    for x, target in batches(3):
        nn.functional.mse_loss(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(value, frozen[key]) for key, value in model.mlp.state_dict().items())
    assert not torch.equal(model.query.weight, before)


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_rows_may_be_any_number(rows) -> None:
    """Products that sum over rows take copies that are zero beyond them, up to a multiple of 16."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 16, bias=False, dtype=torch.float64)
    kp.precision.convert(layer, "tensorwise_current")
    x = torch.randn(rows, 32, dtype=torch.float64)
    padded = torch.cat([x, x.new_zeros(16, 32)])
    grads = []
    for given in (x, padded):
        layer.zero_grad()
        (layer(given)[:rows] * torch.arange(1, rows + 1)[:, None]).sum().backward()
        grads.append(layer.weight.grad.clone())
    assert torch.allclose(*grads, rtol=1e-12, atol=0)


def test_a_layer_falls_back_with_those_it_is_one_with() -> None:
    model = block("tensorwise_current")
    plain = Block()
    plain.load_state_dict(model.state_dict())
    assert kp.precision.fall_back(model, "query", "for a test") == ["query", "key"]
    assert kp.precision.fall_back(model, "mlp.gate", "for a test") == ["mlp.gate", "mlp.up"]
    assert MLP_SLOT not in vars(model.mlp)
    assert site_of(model.mlp.down) is not None
    assert kp.precision.fall_back(model, "mlp.down", "for a test") == ["mlp.down"]
    assert kp.precision.fall_back(model, "out", "for a test") == ["out"]
    x, _ = batches(1)[0]
    assert torch.equal(model(x), plain(x))
    assert {layer.reason for layer in kp.precision.report(model).layers} == {"for a test"}
    with pytest.raises(ModelError, match="no layer that runs in FP8"):
        kp.precision.fall_back(model, "out", "again")
    saved = kp.precision.state(model)
    other = block("tensorwise_current")
    kp.precision.load_state(other, saved)
    assert kp.precision.report(other).converted == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo uses what is deprecated
def test_compiled_code_sees_a_fallback() -> None:
    model = block("tensorwise_current")
    plain = Block()
    plain.load_state_dict(model.state_dict())
    x, _ = batches(1)[0]
    model.compile(backend="aot_eager")
    assert not torch.equal(model(x), plain(x))
    for path in ("query", "mlp.gate", "mlp.down", "out"):
        kp.precision.fall_back(model, path, "for a test")
    assert torch.allclose(model(x), plain(x), rtol=1e-5, atol=1e-6)
