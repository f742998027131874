"""Scaling state: saved beside the checkpoint, taken up bit by bit; weights in FP8 held across micro-steps."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import kernel_pytorch as kp
from kernel_pytorch.errors import InputsError, ModelError
from kernel_pytorch.precision.recipes import RECIPES
from kernel_pytorch.precision.site import site_of
from kernel_pytorch.precision.state import named_sites

from .models import Block, batches, block

MOVING = replace(RECIPES["tensorwise_delayed"], name="moving", power_of_2=False)
"""Scales that are no powers of two change what values are rounded to, so that every lost or doubled move shows."""


def run(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Any], *, micro: int, first: int = 0
) -> list[float]:
    """Train; an optimizer step after each `micro` batches, counted from `first`."""
    losses = []
    for i, (x, target) in enumerate(data, first):
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        losses.append(float(loss.detach()))
        if (i + 1) % micro == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def through_a_file(content: Any) -> Any:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("stop", [4, 5], ids=["after a step", "between micro-steps"])
@pytest.mark.parametrize("recipe", [*RECIPES.values(), MOVING], ids=lambda recipe: recipe.name)
def test_a_resumed_run_goes_on_bit_by_bit(recipe, stop, held) -> None:
    data = batches(10)
    model = block(recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if held:
        kp.precision.hold_weights(model, optimizer)
    run(model, optimizer, data[:stop], micro=2)
    saved = through_a_file({
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "float8": kp.precision.state(model),
        "gradients": {n: p.grad for n, p in model.named_parameters()},
    })  # fmt: skip
    want = run(model, optimizer, data[stop:], micro=2, first=stop)

    other = block(recipe, seed=7)
    others = torch.optim.AdamW(other.parameters(), lr=1e-2)
    if held:
        kp.precision.hold_weights(other, others)
    other.load_state_dict(saved["model"])
    others.load_state_dict(saved["optimizer"])
    kp.precision.load_state(other, saved["float8"])
    for name, parameter in other.named_parameters():
        parameter.grad = saved["gradients"][name]
    assert run(other, others, data[stop:], micro=2, first=stop) == want
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    mine, theirs = kp.precision.state(other)["sites"], kp.precision.state(model)["sites"]
    for name, entry in mine.items():
        for operand, scale in entry["scales"].items():
            assert torch.equal(scale, theirs[name]["scales"][operand]), (name, operand)


def test_without_the_scaling_state_a_resume_differs() -> None:
    """What is saved matters: a model that starts with fresh scales computes otherwise."""
    data = batches(10)
    model = block(MOVING)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    run(model, optimizer, data[:5], micro=1)
    other = block(MOVING, seed=7)
    other.load_state_dict(model.state_dict())
    x = data[2][0]
    assert not torch.equal(model(x), other(x))


def test_keys_of_the_module_stay() -> None:
    assert list(block("tensorwise_delayed").state_dict()) == list(Block().state_dict())


def test_what_does_not_fit_is_told() -> None:
    model = block("tensorwise_delayed")
    saved = kp.precision.state(model)
    with pytest.raises(ModelError, match="another recipe"):
        kp.precision.load_state(block("tensorwise_current"), saved)
    torch.manual_seed(0)
    fewer = kp.precision.convert(Block(), "tensorwise_delayed", exclude=["out"])
    with pytest.raises(ModelError, match=r"other layers run in FP8.*out"):
        kp.precision.load_state(fewer, saved)
    with pytest.raises(InputsError, match="no scaling state"):
        kp.precision.load_state(model, {"version": 99})
    with pytest.raises(ModelError, match="no layer of the model runs in FP8"):
        kp.precision.state(Block())


def test_a_refused_state_changes_nothing() -> None:
    model = block("tensorwise_delayed")
    x, _ = batches(1)[0]
    model(x)
    before = kp.precision.state(model)
    saved = kp.precision.state(model)
    saved["sites"]["out"]["scales"]["input"] = torch.zeros(5)
    with pytest.raises(ModelError, match="another number of casts"):
        kp.precision.load_state(model, saved)
    after = kp.precision.state(model)
    for name, entry in before["sites"].items():
        assert all(torch.equal(s, after["sites"][name]["scales"][o]) for o, s in entry["scales"].items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo uses what is deprecated
@pytest.mark.parametrize("recipe", ["tensorwise_delayed", "tensorwise_current"])
def test_compiled_code_reads_held_weights_that_move_once_a_step(recipe) -> None:
    data = batches(6)
    models = [block(recipe) for _ in range(2)]
    losses, moves = [], []
    for model, compiled in zip(models, (False, True), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        kp.precision.hold_weights(model, optimizer)
        if compiled:
            model.compile(backend="aot_eager", fullgraph=True)
        losses.append(run(model, optimizer, data, micro=3))
        moves.append([float(site.states["weight"][0]) for site, _ in named_sites(model).values() if site.states])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # The first cast sets the scale; then each of the two optimizer steps enters the history once, not each micro-step.
    assert moves[0] == moves[1] == ([2.0] * len(moves[0]))


def test_held_weights_follow_a_checkpoint() -> None:
    model = block("tensorwise_current")
    kp.precision.hold_weights(model)
    x, _ = batches(1)[0]
    before = model(x)
    other = block("tensorwise_current", seed=3)
    model.load_state_dict(other.state_dict())
    site = site_of(model.out)
    assert site is not None
    assert torch.equal(model(x), other(x))
    assert not torch.equal(model(x), before)
    with torch.no_grad():
        model.out.weight.mul_(2)  # eager code sees it without being told
        other.out.weight.mul_(2)
    assert torch.equal(model(x), other(x))
