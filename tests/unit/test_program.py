"""A shipped module is the user's own: same class, same keys; calls outside run the original and are counted."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from kernel_pytorch.core.program import begin, call_counts, clone_model, restore, ship, state_digest
from kernel_pytorch.core.types import Mode
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import InputsError, ModelError


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()


def shipped(*, dynamic: bool, original: bool = True):
    model, x = linear(), torch.randn(2, 4)
    program = begin(clone_model(model), Mode.INFERENCE, {"main": Call((x,))})
    inner = program.call
    program.call = lambda *a: inner(*a) + 100.0
    program.dynamic = dynamic
    return ship(program, model if original else None), model, x


def test_known_inputs_take_the_program_and_others_the_original():
    fast, model, x = shipped(dynamic=False)
    other = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(fast(x), model(x) + 100.0)
        assert torch.equal(fast(other), model(other))
    counts = call_counts(fast)
    assert (counts.inside, counts.outside) == (1, 1)
    assert "(3, 4)" in counts.last_outside


def test_a_program_that_takes_any_shape_is_not_guarded_by_shape():
    fast, model, _ = shipped(dynamic=True)
    other = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(fast(other), model(other) + 100.0)


def test_gradients_and_train_mode_are_outside_an_inference_plan():
    fast, model, x = shipped(dynamic=True)
    assert torch.equal(fast(x), model(x))
    assert "no_grad" in call_counts(fast).last_outside
    with torch.no_grad():
        assert torch.equal(fast.train()(x), model(x))


def test_outside_can_be_an_error():
    fast, _, _ = shipped(dynamic=False, original=False)
    with torch.no_grad(), pytest.raises(InputsError, match=r"\(5, 4\)"):
        fast(torch.randn(5, 4))


def test_class_keys_and_copies_are_the_plain_module():
    fast, model, x = shipped(dynamic=False)
    assert type(fast) is type(model)
    assert list(fast.state_dict()) == list(model.state_dict())
    fast.load_state_dict(model.state_dict())
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        with torch.no_grad():
            assert torch.equal(copied(x), model(x))


def test_restore_gives_the_plain_module_back():
    fast, model, x = shipped(dynamic=False)
    restore(fast)
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
    with pytest.raises(ModelError, match="no plan"):
        call_counts(fast)


def test_clone_keeps_ties_and_copies_tensors_that_autograd_made():
    model = nn.Module()
    model.a = nn.Linear(4, 4)
    model.b = nn.Linear(4, 4)
    model.b.weight = model.a.weight
    model.cached = model.a.weight * 2
    copied = clone_model(model)
    assert copied.a.weight is copied.b.weight
    assert copied.a.weight is not model.a.weight
    assert torch.equal(copied.cached, model.cached)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[0].weight.data.add_(1e-3),
        lambda m: m.train(),
        lambda m: m[0].register_forward_hook(lambda *a: None),
        lambda m: setattr(m[0].bias, "grad", torch.ones(4)),
        lambda m: m[0].bias.requires_grad_(False),
    ],
)
def test_the_digest_sees_every_change(change):
    model = linear()
    before = state_digest(model)
    assert state_digest(model) == before
    change(model)
    assert state_digest(model) != before
