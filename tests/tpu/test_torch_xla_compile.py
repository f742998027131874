"""Compiled training on PyTorch/XLA: what is only recorded when a compiled call begins is not lost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernel_pytorch.backends import manager_for
from kernel_pytorch.core.program import begin, clone_model, fused_loss, ship
from kernel_pytorch.core.types import Mode, Step
from kernel_pytorch.transforms.compile import Compile
from kernel_pytorch.transforms.regional_compile import RegionalCompile

# Dynamo itself looks at the gradient of what a block before it returned, and warnings are errors in tests.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

STEPS = {
    "call": (Compile(), Step("compile", {"backend": "openxla"})),
    "loss": (Compile(), Step("compile", {"backend": "openxla", "scope": "loss"})),
    "blocks": (RegionalCompile(), Step("regional_compile", {"backend": "openxla", "block": "Layer"})),
}


class Layer(nn.Module):
    """One of three."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + F.gelu(self.linear(x))


def rows(seed):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))


def loss_of(model, x):
    return F.mse_loss(model(x), 2.0 * x)


def trained(model, loss, place):
    """Return losses, weights, momenta, and the weights before the second step, of four steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    losses, kept = [], []
    for i in range(4):
        optimizer.zero_grad(set_to_none=True)
        value = loss(model, place(rows(i)))
        value.backward()
        optimizer.step()
        losses.append(value.detach())
        if i == 0:
            kept = [p.detach().clone() for p in model.parameters()]
    momenta = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    return [t.detach().cpu() for t in (*losses, *model.parameters(), *momenta, *kept)]


def models(place):
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Layer(), Layer()).train()
    return model, place(clone_model(model))


@pytest.mark.parametrize("form", STEPS)
def test_optimizers_that_keep_momentum_train_as_on_the_cpu(torch_xla, form):
    manager = manager_for("tpu")
    model, placed = models(manager.place)
    transform, step = STEPS[form]
    program = begin(clone_model(placed), Mode.TRAINING, {}, loss=loss_of)
    shipped = ship(transform.apply(program, step), placed)
    loss = (lambda m, x: fused_loss(m, x)) if form == "loss" else loss_of
    got, want = trained(shipped, loss, manager.place), trained(model, loss_of, lambda t: t)
    for one, other in zip(got, want, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("form", STEPS)
def test_the_ejected_source_trains_as_on_the_cpu(torch_xla, form):
    manager = manager_for("tpu")
    model, placed = models(manager.place)
    transform, step = STEPS[form]
    names = {"model": placed, "call": placed._call_impl}
    exec(transform.source(step), names)
    loss = loss_of
    if form == "loss":
        fused = names["fused_loss"](lambda call, x: F.mse_loss(call(x), 2.0 * x))
        loss = lambda m, x: fused(x)  # noqa: E731
    elif form == "call":
        loss = lambda m, x: F.mse_loss(names["call"](x), 2.0 * x)  # noqa: E731
    got, want = trained(placed, loss, manager.place), trained(model, loss_of, lambda t: t)
    for one, other in zip(got, want, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_dropout_draws_anew_in_each_compiled_call_and_again_under_the_same_seed(torch_xla):
    manager = manager_for("tpu")
    placed = manager.place(nn.Sequential(nn.Dropout(0.5), nn.PReLU()))
    program = begin(clone_model(placed).train(), Mode.TRAINING, {}, loss=loss_of)
    transform, step = STEPS["call"]
    shipped = ship(transform.apply(program, step), placed)
    ones = manager.place(torch.ones(256))

    def drawn(seed):
        torch.manual_seed(seed)
        return [shipped(ones).cpu() for _ in range(2)]

    drawn(1)
    (first, second), (again, _), (other, _) = drawn(3), drawn(3), drawn(4)
    assert 0.3 < float((first == 0).float().mean()) < 0.7
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
