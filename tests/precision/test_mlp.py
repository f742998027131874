"""A gated MLP in FP8 as one, beside the same layers in FP8 apart, and exact on its own operands."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kernel_pytorch.precision.linear import restore_linear, swap_linear, swap_linears
from kernel_pytorch.precision.mlp import fusible, restore_mlp, swap_mlp
from kernel_pytorch.precision.recipes import RECIPES, Product
from kernel_pytorch.precision.site import sites_of

NAMES = [name for name in RECIPES if name.startswith("tensorwise")]


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, bias: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(32, 48, bias=bias, dtype=dtype) for _ in range(2))
        self.down = nn.Linear(48, 32, bias=bias, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def layers(model: MLP):
    return (model.gate, model.up, model.down)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_as_the_layers_apart(name, bias) -> None:
    torch.manual_seed(0)
    model = MLP(bias, torch.float64)
    apart = copy.deepcopy(model)
    swap_mlp(model, layers(model), "silu", name)
    swap_linears([apart.gate, apart.up], name)
    swap_linear(apart.down, name)
    for _ in range(3):
        x = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
        other = x.detach().clone().requires_grad_()
        model.zero_grad()
        apart.zero_grad()
        y, z = model(x), apart(other)
        dy = torch.randn_like(y)
        y.backward(dy)
        z.backward(dy)
        pairs = {"y": (y, z), "x": (x.grad, other.grad)}
        pairs |= {n: (p.grad, dict(apart.named_parameters())[n].grad) for n, p in model.named_parameters()}
        for what, (got, want) in pairs.items():
            # A bias of gate or up is summed from the gradient in FP8, which rounds it; else rounding of sums alone.
            rounded = what in ("gate.bias", "up.bias")
            assert (got - want).norm() <= (0.1 if rounded else 1e-6) * want.norm(), what
    for (_, _, mine), (_, _, theirs) in zip(sites_of(model), sites_of(apart), strict=True):
        for operand, state in mine.states.items():
            assert torch.allclose(state, theirs.states[operand], rtol=1e-6), operand


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_compiled_whole_as_eager(name) -> None:
    torch.manual_seed(0)
    model = MLP()
    swap_mlp(model, layers(model), "silu", name)
    twin = copy.deepcopy(model)
    assert twin.forward.__self__ is twin
    run = torch.compile(twin, fullgraph=True)
    for _ in range(2):
        x = torch.randn(10, 32)
        model.zero_grad()
        twin.zero_grad()
        model(x).sum().backward()
        run(x).sum().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert (p.grad - q.grad).norm() <= 1e-5 * p.grad.norm()


def test_frozen_layers_and_a_checkpoint() -> None:
    torch.manual_seed(0)
    model = MLP()
    swap_mlp(model, layers(model), "silu", "tensorwise_delayed")
    twin = copy.deepcopy(model)
    model.gate.weight.requires_grad_(False)
    twin.gate.weight.requires_grad_(False)
    for _ in range(2):
        x = torch.randn(10, 32, requires_grad=True)
        other = x.detach().clone().requires_grad_()
        model(x).sum().backward()
        checkpoint(twin, other, use_reentrant=False).sum().backward()
        assert torch.equal(x.grad, other.grad)
        assert model.gate.weight.grad is None
        assert torch.equal(model.up.weight.grad, twin.up.weight.grad)
    for (_, _, mine), (_, _, theirs) in zip(sites_of(model), sites_of(twin), strict=True):
        for operand, state in mine.states.items():
            assert torch.equal(state, theirs.states[operand]), operand
    model.requires_grad_(False)
    x = torch.randn(10, 32, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None


def test_it_comes_off_and_what_cannot_be_one() -> None:
    model = MLP()
    x = torch.randn(4, 32)
    plain = model(x)
    swap_mlp(model, layers(model), "silu", "tensorwise_current")
    assert not torch.equal(model(x), plain)
    restore_mlp(model)
    for layer in layers(model):
        restore_linear(layer)
    assert torch.equal(model(x), plain)
    assert not any(name.startswith("_float8") for m in model.modules() for name in vars(m))
    recipe = RECIPES["tensorwise_current"]
    assert fusible(recipe, layers(model))
    assert not fusible(replace(recipe, weight_gradient=Product(float8=False)), layers(model))
    handle = model.up.register_forward_hook(lambda *_: None)
    assert not fusible(recipe, layers(model))
    handle.remove()
    model.up = model.gate
    assert not fusible(recipe, layers(model))
