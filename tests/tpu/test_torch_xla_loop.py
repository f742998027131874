"""Blocks in a loop on PyTorch/XLA: one `while` forward and one backward, with the losses and weights of the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernel_pytorch.advanced_memory.scan_layers import ScanLayers
from kernel_pytorch.backends import manager_for
from kernel_pytorch.core.program import begin, clone_model, ship
from kernel_pytorch.core.types import Mode, Step

LAYERS = 5


class Layer(nn.Module):
    """One of five."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x, shift):
        return x + self.down(F.gelu(self.up(x))) + shift


class Stack(nn.Module):
    """Layers that share a shift."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.shift = nn.Parameter(torch.randn(8))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, self.shift)
        return x


def rows(seed):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))


def loss_of(model, x):
    return F.mse_loss(model(x), 2.0 * x)


def trained(model, place, wait=lambda: None):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    losses = []
    for i in range(4):
        optimizer.zero_grad(set_to_none=True)
        value = loss_of(model, place(rows(i)))
        value.backward()
        optimizer.step()
        wait()
        losses.append(value.detach())
    return [t.detach().cpu() for t in (*losses, *model.parameters())]


def looped(model, keep, plain):
    step = Step("scan_layers", {"block": "Layer", "keep": keep, "plain": plain})
    return ship(ScanLayers().apply(begin(model, Mode.TRAINING, {}, loss=loss_of), step), None)


@pytest.mark.parametrize(("keep", "plain"), [("", 0), ("product:0", 1)])
def test_losses_and_weights_are_those_of_the_cpu(torch_xla, keep, plain):
    manager = manager_for("tpu")
    torch.manual_seed(0)
    model = Stack().train()
    want = trained(clone_model(model), lambda x: x)
    got = trained(looped(manager.place(clone_model(model)), keep, plain), manager.place, manager.synchronize)
    for one, two in zip(want, got, strict=True):
        assert torch.allclose(one, two, atol=1e-6)


def test_the_program_has_two_loops_and_a_products_body_once(torch_xla):
    import torch_xla as xla

    model = looped(manager_for("tpu").place(Stack().train()), "", 0)
    loss = loss_of(model, manager_for("tpu").place(rows(0)))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    text = xla._XLAC._get_xla_tensors_hlo(list(gradients))
    assert text.count(" while(") == 2
    assert text.count(" dot(") < LAYERS * 2, "the layers are written out"
