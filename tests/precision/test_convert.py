"""`convert` and its report: what is converted together, what is left and why, and on a CPU what `auto` does."""

from __future__ import annotations

import sys

import pytest
import torch

import kernel_pytorch as kp
from kernel_pytorch.errors import InputsError, ModelError
from kernel_pytorch.precision import choice as choosing
from kernel_pytorch.precision.choice import PRODUCTS, Choice, cheapest
from kernel_pytorch.precision.recipes import RECIPES
from kernel_pytorch.precision.site import site_of

from .test_judging import Net


def example() -> torch.Tensor:
    return torch.randn(4, 8, 64)


def test_a_named_recipe_is_emulated_on_a_cpu_and_says_so() -> None:
    torch.manual_seed(0)
    model, x = Net(), example()
    plain = model(x).detach()
    keys = list(model.state_dict())
    got = kp.precision.convert(model, "tensorwise_delayed", example_inputs=x)
    assert got is model
    found = kp.precision.report(model)
    assert found.emulated
    assert len(found.converted) == len(found.layers) == 11
    text = str(found)
    assert "11 of 11 linear layers in FP8 (emulated on this device: right, and slow)" in text
    assert "a gated MLP with blocks.0.mlp.up_proj, blocks.0.mlp.down_proj" in text
    assert "one with blocks.1.b" in text
    assert site_of(model.blocks[0].a) is site_of(model.blocks[0].b)
    error = float((model(x).detach() - plain).norm() / plain.norm())
    assert 1e-3 < error < 0.1
    assert list(model.state_dict()) == keys
    with pytest.raises(ModelError, match="in FP8 already"):
        kp.precision.convert(model)
    assert torch.equal(kp.precision.restore(model)(x), plain)
    with pytest.raises(ModelError, match="was not converted"):
        kp.precision.report(model)


def test_auto_on_a_cpu_converts_nothing_and_says_why() -> None:
    model = kp.precision.convert(Net())
    found = kp.precision.report(model)
    assert not found.converted
    assert not found.emulated
    assert all("emulated on cpu" in layer.reason for layer in found.layers)
    assert "keeps its format" in str(found)
    with pytest.raises(InputsError, match="no FP8 recipe"):
        kp.precision.convert(Net(), "fastest")


def test_without_inputs_layers_are_converted_apart_and_excluded_ones_stay() -> None:
    model = kp.precision.convert(Net(), "tensorwise_current", exclude=("blocks.1",))
    found = {layer.path: layer for layer in kp.precision.report(model).layers}
    assert site_of(model.blocks[0].a) is not site_of(model.blocks[0].b)
    assert found["blocks.1.a"].reason == "excluded by the caller"
    assert not found["blocks.1.a"].recipe
    assert found["out"].products == PRODUCTS


def test_inputs_that_the_model_does_not_take_are_told() -> None:
    model = kp.precision.convert(Net(), "tensorwise_current", example_inputs=torch.randn(2, 5))
    (note,) = kp.precision.report(model).notes
    assert "did not run on its example inputs (RuntimeError: Given normalized_shape=[64]" in note


TIMES = {f"{kind} {p}": ms for kind, ms in (("plain", 10.0), ("float8", 5.0)) for p in PRODUCTS}


def casts(each: float) -> dict[str, float]:
    sides = {"row": each, "turned": each, "both": 1.5 * each}
    return {f"{o} {s}": ms for o in ("input", "weight", "gradient") for s, ms in sides.items()}


def test_products_are_chosen_by_their_time_with_casts() -> None:
    recipe = RECIPES["tensorwise_delayed"]
    all_of_them = cheapest({**TIMES, **casts(1.0)}, recipe)
    assert (all_of_them.plain_ms, all_of_them.ms) == (30.0, 15.0 + 3 * 1.5)
    assert all_of_them.recipe == recipe
    # A weight's gradient that is no faster is left, and its transposed copies are not paid for.
    slow = cheapest({**TIMES, **casts(1.0), "float8 weight_gradient": 9.9}, recipe)
    assert slow.ms == 10.0 + 2 * 5.0 + 2 * 1.0 + 1.5
    assert [getattr(slow.recipe, p).float8 for p in PRODUCTS] == [True, True, False]
    assert cheapest({**TIMES, **casts(4.0)}, recipe).recipe is None
    nearly = {**TIMES, **{f"float8 {p}": 9.4 for p in PRODUCTS}, **casts(0.3)}
    assert cheapest(nearly, recipe) == Choice(None, 30.0, 30.0)  # 1.5 % is not worth another format


def test_auto_takes_what_was_measured(monkeypatch) -> None:
    """The measurement is the GPU's; here its results are given, and must decide each layer."""
    converting = sys.modules["kernel_pytorch.precision.convert"]  # the package's attribute is the function
    asked = []

    def measured(shape, recipes, device):
        asked.append((shape.rows, shape.inside, shape.outside))
        recipe = recipes[0] if shape.outside >= 128 or shape.inside >= 128 else None
        return Choice(recipe, 2.0, 1.0 if recipe else 2.0)

    monkeypatch.setattr(converting, "choose", measured)
    monkeypatch.setattr(converting, "unsupported", lambda *_: None)
    model = kp.precision.convert(Net(), example_inputs=example())
    found = {layer.path: layer for layer in kp.precision.report(model).layers}
    assert (32, 64, 256) in asked  # gate and up together
    assert (32, 64, 128) in asked  # a and b together
    assert found["blocks.0.mlp.up_proj"].ms == 2.0  # of the two parts of the MLP
    assert found["blocks.0.a"].recipe == "tensorwise_delayed"
    assert found["out"].reason == "its own format is as fast"
    assert choosing.choose is not measured
