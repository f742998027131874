"""The transform `float8`: which layers it takes, what it says of the others, and that it comes off again."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kernel_pytorch.catalog import apply_candidate, find
from kernel_pytorch.core.config import KernelPyTorchConfig, NvidiaWants
from kernel_pytorch.core.program import begin, restore, ship, state_digest
from kernel_pytorch.core.types import Candidate, Mode, Skip, Step
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError, KptError
from kernel_pytorch.hardware import detect
from kernel_pytorch.precision.eligible import verdicts
from kernel_pytorch.precision.recipes import RECIPES
from kernel_pytorch.precision.site import sites_of
from kernel_pytorch.search.propose import propose


class Language(nn.Module):
    """Two layers with a residual, words in and words out."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32)
        self.first, self.second, self.odd = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 20)
        self.head = nn.Linear(32, 50, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        x = x + self.second(nn.functional.silu(self.first(x)))
        return self.head(x) + self.odd(x).mean()


def applied(model: nn.Module, recipe: str, **params: bool):
    program = begin(model, Mode.TRAINING, {"main": Call((torch.zeros(2, 8, dtype=torch.long),))})
    return apply_candidate(program, Candidate((Step("float8", {"recipe": recipe, **params}),)))


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_layers_run_in_fp8_and_come_back(recipe) -> None:
    torch.manual_seed(0)
    model = Language()
    ids = torch.arange(16).view(2, 8)
    plain, before = model(ids).detach(), state_digest(model)
    keys = list(model.state_dict())
    program = applied(model, recipe)
    shipped = ship(program, model)
    assert [path for path, _, _ in sites_of(model)] == ["first", "second"]
    got = shipped(ids)
    error = float((got.detach() - plain).norm() / plain.norm())
    assert 1e-4 < error < 0.1
    got.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert list(shipped.state_dict()) == keys
    assert any("2 of 4" in note for note in program.notes)
    assert any("makes the logits" in note and "16 does not divide" in note for note in program.notes)
    model.zero_grad(set_to_none=True)
    restore(shipped)
    assert torch.equal(model(ids), plain)
    assert state_digest(model) == before


def test_every_layer_has_a_verdict_with_its_reason() -> None:
    model = Language()
    found = {v.path: v.reason for v in verdicts(model)}
    assert found["first"] == ""
    assert "16 does not divide" in found["odd"]
    assert "logits" in found["head"]
    allowed = {v.path: v.reason for v in verdicts(model, allow_head=True, exclude=("first",))}
    assert allowed["first"] == "excluded by the caller"
    assert "16 does not divide" in allowed["head"]  # 50 words
    model.second.forward = lambda x: x
    assert "replaced" in {v.path: v.reason for v in verdicts(model)}["second"]


def test_the_head_takes_part_where_the_user_allows_it() -> None:
    transform = find("float8")
    hopper = replace(detect("cpu"), vendor="nvidia", arch="sm_90", features=("bf16", "fp8"))
    spec = SimpleNamespace(mode=Mode.TRAINING, modules=("Linear",))
    for allowed in (False, True):
        config = KernelPyTorchConfig.for_training(nvidia=NvidiaWants(allow_float8_lm_head=allowed))
        assert KernelPyTorchConfig(**config.as_json()).nvidia == config.nvidia
        steps = propose([transform], spec, hopper, config).steps[0][1]
        assert any(step.params.get("head") for step in steps) is allowed
        assert Step("float8", {"recipe": "tensorwise_delayed"}) in steps
    with pytest.raises(KptError, match="nvidia: unknown 'allow_all'"):
        KernelPyTorchConfig(nvidia=("allow_all",))

    class Wide(Language):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)

    torch.manual_seed(0)
    model = Wide()
    applied(model, "tensorwise_delayed", head=True)
    assert [path for path, _, _ in sites_of(model)] == ["first", "second", "head"]
    model(torch.arange(16).view(2, 8)).logsumexp(-1).mean().backward()
    assert model.head.weight.grad is not None


def test_a_head_is_found_by_what_it_shares_or_maps() -> None:
    tied = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 64, bias=False))
    assert [v.head for v in verdicts(tied)] == [False, True]
    tied[1] = nn.Linear(32, 64, bias=False)
    tied[1].weight = tied[0].weight
    assert [v.head for v in verdicts(tied)] == [True, True]


def test_where_it_does_not_apply() -> None:
    transform = find("float8")
    cpu = detect("cpu")
    skip = transform.probe(cpu)
    assert isinstance(skip, Skip)
    assert "emulated" in skip.reason
    ampere = replace(cpu, vendor="nvidia", name="A100", arch="sm_80", features=("bf16",))
    assert "tensor cores" in transform.probe(ampere).reason
    with pytest.raises(CandidateError, match="recipe must be one of"):
        applied(Language(), "fastest")
    with pytest.raises(CandidateError, match="no linear layer is one for FP8: 1 x 16 does not divide"):
        applied(nn.Linear(7, 16), "tensorwise_current")
    with pytest.raises(CandidateError, match="cannot be written as plain PyTorch"):
        transform.source(Step("float8", {"recipe": "tensorwise_current"}))
