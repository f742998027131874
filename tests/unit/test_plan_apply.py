"""Replaying a plan: on a copy for inference, in place for training; refused where it was not made for."""

from __future__ import annotations

import copy
import logging
import pickle
from dataclasses import replace

import pytest
import torch
from plans import plan, trial
from torch import nn

from kernel_pytorch.core.describe import fingerprint
from kernel_pytorch.core.program import call_counts, restore, signatures_of, state_digest
from kernel_pytorch.core.types import Mode, Step
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError, InputsError, KptError, ModelError, PlanError
from kernel_pytorch.hardware import detect
from kernel_pytorch.plan.apply import apply, prepare
from kernel_pytorch.plan.schema import dumps

BF16 = Step("dtype", {"to": "bfloat16", "how": "cast"})
AUTOCAST = Step("dtype", {"to": "bfloat16", "how": "autocast"})
FUSED = Step("fused_optimizer", {"implementation": "fused"})


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(width, 2)

    def forward(self, x):
        return {"out": self.second(self.drop(self.norm(self.first(x)).relu()))}


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


X = torch.linspace(-1, 1, 12).reshape(3, 4)


def plan_for(model: nn.Module, *steps: Step, mode: Mode = Mode.INFERENCE):
    made = plan(*steps)
    spec = replace(
        made.workload, fingerprint=fingerprint(model), mode=mode, signatures={"main": signatures_of(Call((X,)))}
    )
    return replace(made, workload=spec, device=detect(), chosen=trial(*steps, phase="confirm"))


def test_a_copy_runs_the_plan_and_the_model_stays_as_it_was():
    model = net()
    before, plain = state_digest(model), model(X)["out"]
    fast = apply(plan_for(model, BF16), model)
    with torch.no_grad():
        out = fast(X)["out"]
    assert type(fast) is Net
    assert fast is not model
    assert list(fast.state_dict()) == list(model.state_dict())
    assert out.dtype is torch.float32
    assert 0 < (out - plain).abs().max() < 0.05
    assert state_digest(model) == before
    assert torch.equal(model(X)["out"], plain)
    assert (call_counts(fast).inside, call_counts(fast).outside) == (1, 0)


def test_calls_outside_run_the_original_or_raise():
    model = net()
    fast = apply(plan_for(model, BF16), model)
    assert torch.equal(fast(X)["out"], model(X)["out"])  # gradients are enabled
    assert call_counts(fast).outside == 1
    strict = apply(plan_for(model, BF16), model, outside="error")
    with pytest.raises(InputsError, match="gradients are enabled"):
        strict(X)
    with pytest.raises(KptError, match="outside must be"):
        apply(plan_for(model, BF16), model, outside="whatever")


class Specialised:
    """A transform that holds for the shapes it has seen, as a compiled graph does."""

    name = "specialised"
    modes = frozenset({Mode.INFERENCE, Mode.TRAINING})
    group = "compile"

    def __init__(self) -> None:
        self.seen = None

    def apply(self, program, step):
        self.seen = program
        inner = program.call
        program.call = lambda *a, **k: {"out": inner(*a, **k)["out"] + 100.0}
        program.dynamic = False
        return program


@pytest.fixture
def specialised(monkeypatch):
    from kernel_pytorch import catalog

    transform = Specialised()
    monkeypatch.setattr(catalog, "TRANSFORMS", (*catalog.TRANSFORMS, transform))
    monkeypatch.setattr(
        "kernel_pytorch.plan.apply.apply_candidate",
        lambda program, candidate, _: catalog.apply_candidate(program, candidate, catalog.TRANSFORMS),
    )
    return transform


@pytest.mark.parametrize("inputs", [None, X, (X,), ((X,), {}), {"main": Call((X,))}])
def test_what_is_specialised_on_shapes_is_guarded_with_and_without_inputs(specialised, inputs):
    model = net()
    fast = apply(plan_for(model, Step("specialised")), model, inputs=inputs)
    with torch.no_grad():
        assert torch.equal(fast(X)["out"], model(X)["out"] + 100.0)
        other = X[:2]
        assert torch.equal(fast(other)["out"], model(other)["out"])
        assert torch.equal(fast(X.double().float())["out"], model(X)["out"] + 100.0)
    assert "(2, 4)" in call_counts(fast).last_outside
    assert bool(specialised.seen.calls) is (inputs is not None)


def test_artifacts_are_offered_beside_the_plan_and_trusted_only_on_demand(specialised, tmp_path):
    model = net()
    (tmp_path / "plan.json").write_text(dumps(plan_for(model, Step("specialised"))))
    for path in (tmp_path, tmp_path / "plan.json"):
        apply(path, model)
        assert specialised.seen.artifact_dir == tmp_path / "artifacts"
        assert not specialised.seen.trust_artifacts
    apply(str(tmp_path), model, trust_artifacts=True)
    assert specialised.seen.trust_artifacts


def test_a_plan_that_keeps_the_model_needs_no_second_one():
    model = net()
    same = apply(plan_for(model), model)
    with torch.no_grad():
        assert torch.equal(same(X)["out"], model(X)["out"])
    assert torch.equal(same(X)["out"], model(X)["out"])
    assert call_counts(same).inside == 1


def test_a_model_in_train_mode_is_applied_in_eval_mode_and_left_alone():
    model = net().train()
    fast = apply(plan_for(model, BF16), model)
    assert model.training
    assert not fast.training
    assert not fast.drop.training


def test_copies_and_pickles_of_an_applied_model_are_plain(tmp_path):
    model = net()
    fast = apply(plan_for(model, AUTOCAST), model)
    plain = copy.deepcopy(fast)
    assert torch.equal(plain(X)["out"], model(X)["out"])
    assert torch.equal(pickle.loads(pickle.dumps(fast))(X)["out"], model(X)["out"])
    other = net()
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(X)["out"], model(X)["out"])


def test_another_model_is_refused():
    made = plan_for(net(), BF16)
    with pytest.raises(PlanError, match=r"another model than this Net: tiny \(146 parameters, the plan's has 20\)"):
        apply(made, Net(16))
    with pytest.raises(PlanError, match="another model"):
        apply(made, net().double())
    counted = replace(made, workload=replace(made.workload, parameters=sum(p.numel() for p in net().parameters())))
    with pytest.raises(PlanError, match="same number of parameters"):
        apply(counted, net().double())


@pytest.mark.parametrize("changed", [{"vendor": "nvidia", "arch": "sm_90"}, {"arch": "x86_64-other"}])
def test_another_device_is_refused(changed):
    made = plan_for(net(), BF16)
    with pytest.raises(PlanError, match="another device") as caught:
        apply(replace(made, device=replace(made.device, **changed)), net())
    assert "kpt optimize" in caught.value.fix


def test_another_number_of_cores_or_version_is_told(caplog):
    made = plan_for(net(), BF16)
    other = replace(made.device, num_devices=1024, software={**made.device.software, "torch": "1.0"})
    with caplog.at_level(logging.WARNING):
        apply(replace(made, device=other), net())
    assert "1024 devices or cores" in caplog.text
    assert "torch 1.0" in caplog.text


# training


def training(*steps: Step):
    model = net().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, plan_for(model, *steps, mode=Mode.TRAINING)


def step(model, optimizer, seed=0):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    loss = model(X)["out"].square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_prepare_keeps_the_parameters_and_restore_undoes_everything():
    model, optimizer, made = training(AUTOCAST, FUSED)
    twin, twin_optimizer, _ = training()
    parameters = [id(p) for p in model.parameters()]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    prepared, same = prepare(model, optimizer, plan=made)
    assert prepared is model
    assert same is optimizer
    assert optimizer.param_groups[0]["fused"]
    assert [id(p) for p in model.parameters()] == parameters
    low = [step(model, optimizer, i) for i in range(3)]
    full = [step(twin, twin_optimizer, i) for i in range(3)]
    assert low != full
    assert low == pytest.approx(full, rel=0.05)
    assert call_counts(model).inside == 3
    assert restore(model) is model
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == groups
    with pytest.raises(ModelError):
        call_counts(model)
    twin.load_state_dict(model.state_dict())
    assert step(model, optimizer) == step(twin, twin_optimizer)


def test_a_copy_without_an_optimizer_gets_the_other_steps_and_says_so(caplog):
    model, _, made = training(AUTOCAST, FUSED)
    with caplog.at_level(logging.WARNING):
        copy_of_it = apply(made, model)
    assert "fused_optimizer" in caplog.text
    assert "kp.prepare" in caplog.text
    low, full = (net(X)["out"] for net in (copy_of_it, model))
    assert not torch.equal(low, full)


def test_a_training_loop_may_evaluate():
    model, optimizer, made = training(AUTOCAST)
    prepare(model, optimizer, plan=made)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(X)["out"], copy.deepcopy(model)(X)["out"])
    assert call_counts(model).outside == 1


def test_a_specialised_training_step_takes_what_the_loss_makes_of_a_batch(specialised):
    model, optimizer, made = training(Step("specialised"))
    prepare(model, optimizer, plan=made, inputs=(X, X))
    model(X[:1])
    assert call_counts(model).inside == 1


def test_prepare_refuses_and_changes_nothing():
    model, optimizer, made = training(FUSED, AUTOCAST)
    before = state_digest(model)
    with pytest.raises(PlanError, match="training plan"):
        prepare(model, optimizer, plan=plan_for(model, BF16))
    with pytest.raises(CandidateError):
        prepare(model, torch.optim.LBFGS(model.parameters()), plan=made)
    assert state_digest(model) == before
    with pytest.raises(ModelError, match="no plan"):
        restore(model)
    prepare(model, optimizer, plan=made)
    with pytest.raises(ModelError, match="already"):
        prepare(model, optimizer, plan=made)


class Replacing(Specialised):
    name = "specialised"

    def apply(self, program, step):
        model, before = program.model, program.model.second.weight
        model.second.weight = nn.Parameter(before.detach().clone())
        program.undo.append(lambda: setattr(model.second, "weight", before))
        return program


def test_a_step_that_replaces_parameters_is_undone(specialised):
    specialised.apply = Replacing().apply
    model, optimizer, made = training(Step("specialised"))
    weight = model.second.weight
    with pytest.raises(CandidateError, match="replaces parameters"):
        prepare(model, optimizer, plan=made)
    assert model.second.weight is weight
