from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.types import Gate, Verdict
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import ModelError
from kernel_pytorch.validation.lift import lift_tree, lifted, lifted_model
from kernel_pytorch.validation.unified_validator import UnifiedValidator, first_divergence
from kernel_pytorch.validation.vary import perturb, redrawn, resized, variations


class Norm(nn.Module):
    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.eps = eps

    def forward(self, x):
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Net(nn.Module):
    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 16), Norm(eps), nn.Linear(16, 4)
        nn.init.zeros_(self.first.bias)

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


@pytest.fixture
def pair():
    torch.manual_seed(0)
    model = Net().eval()
    return copy.deepcopy(model), model


def test_a_copy_is_valid_and_neither_model_is_changed(pair):
    candidate, reference = pair
    before = copy.deepcopy(reference.state_dict())
    report = UnifiedValidator().validate(candidate, reference, torch.randn(6, 8))
    assert report.passed, report.worst
    assert {c.gate for c in report.checks} == {Gate.CONTRACT, Gate.STRUCTURE, Gate.PRECISION}
    for model in pair:
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert not any(m._forward_hooks for m in model.modules())


def test_a_bias_of_zero_that_is_not_added_is_found(pair):
    _, reference = pair
    candidate = copy.deepcopy(reference)
    candidate.first.forward = lambda x: x @ candidate.first.weight.T

    class NoBias(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T

    candidate.first.__class__ = NoBias
    del candidate.first.forward
    inputs = torch.randn(6, 8)
    assert UnifiedValidator().validate(candidate, reference, inputs, level="quick").passed
    report = UnifiedValidator().validate(candidate, reference, inputs)
    assert not report.passed
    assert report.worst.gate is Gate.STRUCTURE
    assert report.diverged_at == "first"


def test_another_eps_is_found_and_located(pair):
    _, reference = pair
    candidate = Net(eps=1e-6).eval()
    candidate.load_state_dict(reference.state_dict())
    report = UnifiedValidator().validate(candidate, reference, torch.randn(6, 8))
    assert report.worst.gate is Gate.STRUCTURE
    assert report.diverged_at == "norm"
    candidate.norm.eps = 0.1
    assert first_divergence(candidate, reference, torch.randn(6, 8)) == "norm"
    assert first_divergence(reference, reference, torch.randn(6, 8)) == ""


def test_a_reference_that_gives_nan_is_an_error(pair):
    candidate, reference = pair
    with torch.no_grad():
        reference.second.bias.fill_(float("nan"))
    with pytest.raises(ModelError, match="NaN"):
        UnifiedValidator().validate(candidate, reference, torch.randn(6, 8))


def test_an_unknown_level_is_refused(pair):
    with pytest.raises(ValueError, match="level"):
        UnifiedValidator().validate(*pair, torch.randn(6, 8), level="lax")


class Slow(Net):
    def forward(self, x):
        for _ in range(8):
            out = super().forward(x)
        return out


@pytest.mark.serial
def test_a_module_that_is_much_slower_fails_and_itself_does_not(pair):
    candidate, reference = pair
    validator = UnifiedValidator(KernelPyTorchConfig(budget_s=25.0))
    inputs = torch.randn(64, 8)
    slower = validator.check_performance(Slow().eval(), reference, inputs)
    assert slower.verdict is Verdict.FAIL
    assert slower.verdict == "FAIL"
    assert slower.ratio.high < 1.0
    assert slower.ratio == slower.measurement.ratio
    assert "slower" in slower.reason
    same = validator.check_performance(candidate, reference, inputs, max_slowdown=0.5)
    assert same.verdict == "PASS"
    assert same.ratio.low > 1.0 / 1.5
    faster = validator.check_performance(reference, Slow().eval(), inputs)
    assert faster.verdict == "PASS"
    assert "faster" in faster.reason


def test_performance_is_not_judged_without_a_slowdown_that_matters(pair):
    with pytest.raises(ValueError, match="max_slowdown"):
        UnifiedValidator().check_performance(*pair, torch.randn(6, 8), max_slowdown=0.0)


def test_lifting_turns_hard_coded_casts_into_fp64():
    torch.manual_seed(0)
    model = lifted_model(Net().eval())
    x = lift_tree(torch.randn(3, 8))
    with torch.no_grad():
        plain = model(x)
        with lifted():
            exact = model(x)
            assert torch.zeros(1).dtype is torch.float64
    assert exact.dtype is torch.float64
    assert 1e-12 < float((plain - exact).abs().max()) < 1e-5
    assert torch.zeros(1).dtype is torch.float32


def test_perturbing_moves_special_values_and_keeps_ties_signs_and_masks():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    nn.init.zeros_(model[0].bias)
    model.register_buffer("mask", torch.tril(torch.ones(4, 4)))
    perturb(model, 0)
    assert model[0].bias.abs().min() > 0
    assert (model[1].weight != 1).all()
    assert (model[1].running_var > 0).all()
    assert (model[1].running_var != 1).all()
    assert model[2].weight is model[0].weight
    assert torch.equal(model.mask, torch.tril(torch.ones(4, 4)))


def test_variations_change_values_batch_and_length_together():
    ids = torch.arange(20).reshape(4, 5)
    mask = torch.ones(4, 5, dtype=torch.long)
    call = Call((), {"input_ids": ids, "attention_mask": mask, "flag": True})
    shapes = {tuple(c.kwargs["input_ids"].shape) for _, c in variations("standard", 0, call)}
    assert {(2, 5), (5, 2), (1, 5), (2, 8), (2, 4)} <= shapes
    for _, varied in variations("strict", 0, call):
        assert varied.kwargs["attention_mask"].shape == varied.kwargs["input_ids"].shape
        assert varied.kwargs["input_ids"].max() < 20
        assert varied.kwargs["flag"] is True
    assert not torch.equal(redrawn(call, 1).kwargs["input_ids"], ids)
    assert torch.equal(resized(call, batch=2).kwargs["input_ids"], ids[:2])


def test_other_weights_are_located_too(pair):
    _, reference = pair
    candidate = Net().eval()
    candidate.load_state_dict(reference.state_dict())
    with torch.no_grad():
        candidate.second.weight *= 1.1
    report = UnifiedValidator().validate(candidate, reference, torch.randn(6, 8), level="quick")
    assert not report.passed
    assert report.diverged_at == "second"
