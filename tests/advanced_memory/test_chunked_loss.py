"""Chunked losses are the plain ones, and are found by how a loss uses logits."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from kernel_pytorch.advanced_memory.chunked_head import ChunkedHead
from kernel_pytorch.advanced_memory.chunked_loss import chunked_cross_entropy
from kernel_pytorch.advanced_memory.logits import ChunkedLogits
from kernel_pytorch.core.program import begin
from kernel_pytorch.core.types import Mode, Step
from kernel_pytorch.errors import CandidateError


@pytest.fixture
def made():
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((40, 8), (11, 8), (11,)))
    labels = torch.randint(0, 11, (40,))
    labels[3] = -100
    return hidden, weight, bias, labels


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 10, 13, 500])
@pytest.mark.parametrize("spread", [False, True])
def test_loss_and_gradients_are_those_of_cross_entropy(made, reduction, smoothing, rows, spread):
    hidden, weight, bias, labels = made
    options = {"reduction": reduction, "label_smoothing": smoothing}
    want = functional.cross_entropy(functional.linear(hidden, weight, bias), labels, **options)
    got = chunked_cross_entropy(hidden, weight, labels, bias=bias, rows=rows, spread=spread, **options)
    torch.testing.assert_close(got, want)
    for one, two in zip(*(torch.autograd.grad(3 * x, (hidden, weight, bias)) for x in (got, want)), strict=True):
        torch.testing.assert_close(one, two)


def test_frozen_weights_get_no_gradient(made):
    hidden, weight, _, labels = made
    weight.requires_grad_(requires_grad=False)
    chunked_cross_entropy(hidden, weight, labels, rows=10).backward()
    assert weight.grad is None
    assert hidden.grad is not None


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 11, bias=False)

    def forward(self, x):
        return self.head(self.body(x))


def shifted(model, batch):
    x, labels = batch
    logits = model(x).float()
    return functional.cross_entropy(logits[..., :-1, :].contiguous().view(-1, 11), labels[:, 1:].reshape(-1))


def tied(model, batch):
    x, labels = batch
    return nn.CrossEntropyLoss()((model.body(x) @ model.head.weight.t()).flatten(0, 1), labels.flatten())


def capped(model, batch):
    x, labels = batch
    return functional.cross_entropy((5 * torch.tanh(model(x) / 5)).view(-1, 11), labels.view(-1))


def by_class(model, batch):
    x, labels = batch
    return functional.cross_entropy(model(x).transpose(1, 2), labels)


def last_only(model, batch):
    x, labels = batch
    return functional.cross_entropy(model(x)[:, -1], labels[:, -1])


def columns(model, batch):
    x, labels = batch
    return functional.cross_entropy(model(x)[..., :5].reshape(-1, 5), labels.view(-1).clamp(max=4))


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(2, 6, 8), torch.randint(0, 11, (2, 6))


@pytest.mark.parametrize(("loss", "rows"), [(shifted, 10), (tied, 12), (last_only, 2)])
def test_logits_are_followed_to_their_loss(loss, rows, batch):
    torch.manual_seed(0)
    model = Model()
    want = torch.autograd.grad(loss(model, batch), list(model.parameters()))
    mode = ChunkedLogits(4)
    with mode:
        value = loss(model, batch)
    assert (mode.replaced, mode.seen) == (1, [rows])
    torch.testing.assert_close(value, loss(model, batch))
    for one, two in zip(torch.autograd.grad(value, list(model.parameters())), want, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("loss", [capped, by_class, columns])
def test_what_is_no_plain_view_of_logits_runs_as_written(loss, batch):
    torch.manual_seed(0)
    model, mode = Model(), ChunkedLogits(4)
    with mode:
        value = loss(model, batch)
    assert mode.replaced == 0
    assert mode.passed
    assert torch.equal(value, loss(model, batch))


def test_under_autocast_the_products_keep_its_dtype(batch):
    torch.manual_seed(0)
    model, mode = Model(), ChunkedLogits(4)

    def cast():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return shifted(model, batch)

    want = torch.autograd.grad(cast(), list(model.parameters()))
    with mode:
        value = cast()
    assert mode.replaced == 1
    for one, two in zip(torch.autograd.grad(value, list(model.parameters())), want, strict=True):
        assert (one - two).norm() <= 2e-2 * two.norm()


def test_the_transform_says_why_a_loss_cannot_be_chunked(batch):
    program = begin(Model(), Mode.TRAINING, {}, loss=capped)
    done = ChunkedHead().apply(program, Step("chunked_loss", {"rows": 4}))
    with pytest.raises(CandidateError, match="no linear layer's result"):
        done.loss(done.model, batch)
