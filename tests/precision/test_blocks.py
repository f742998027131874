"""Recipes by blocks: each product is that of the operands as the formats hold them, in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import kernel_pytorch as kp
from kernel_pytorch.ops.block_cast import BLOCK_FORMATS, block_cast, dequantised
from kernel_pytorch.precision.blocks import BLOCK_RECIPES

from .models import Block, batches

NAMES = list(BLOCK_RECIPES)


def held(x: torch.Tensor, name: str) -> torch.Tensor:
    """Return what a format holds of a matrix whose blocks divide it, in fp64."""
    return dequantised(block_cast(x, name), BLOCK_FORMATS[name])


@pytest.mark.parametrize("name", NAMES)
def test_three_products_are_exact_on_their_operands(name) -> None:
    torch.manual_seed(0)
    recipe = BLOCK_RECIPES[name]
    layer = nn.Linear(256, 128, bias=False, dtype=torch.float64)
    kp.precision.convert(layer, name)
    x = torch.randn(128, 256, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(128, 128, dtype=torch.float64) * 1e-5
    y = layer(x)
    y.backward(dy)
    weight, data = layer.weight.detach(), x.detach()
    kinds = {o: str(getattr(recipe, f"{o}_format")) for o in ("input", "weight", "gradient")}
    for got, want in (
        (y.detach(), held(data, kinds["input"]) @ held(weight, kinds["weight"]).t()),
        (x.grad, held(dy, kinds["gradient"]) @ held(weight.t().contiguous(), kinds["weight"]).t()),
        (
            layer.weight.grad,
            held(dy.t().contiguous(), kinds["gradient"]) @ held(data.t().contiguous(), kinds["input"]).t(),
        ),
    ):
        assert (got - want).norm() <= 1e-12 * want.norm()
        assert want.norm() > 0


@pytest.mark.parametrize("name", NAMES)
def test_edges_are_filled_with_zeros(name) -> None:
    """40 rows of 48: what is beyond the matrix is nothing in any sum."""
    torch.manual_seed(0)
    x = torch.randn(40, 48)
    recipe = BLOCK_RECIPES[name]
    for summed in (0, 1):
        back = recipe.rounded(x, "weight", summed=summed)
        assert back.shape == x.shape
        assert 0.0 < float((back - x).norm() / x.norm()) < 0.15


@pytest.mark.parametrize("name", NAMES)
def test_a_model_learns_says_what_it_is_and_comes_back(name) -> None:
    torch.manual_seed(0)
    model = Block()
    plain = copy.deepcopy(model)
    kp.precision.convert(model, name)
    told = kp.precision.report(model)
    assert len(told.converted) == 6
    assert "verified: no" in str(told)
    data, losses = batches(1)[0], []
    for one in (model, plain):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
        for _ in range(25):
            loss = nn.functional.mse_loss(one(data[0]), data[1])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], abs=0.05)  # both began above 1
    kp.precision.restore(model)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(data[0]), plain(data[0]))
