"""`compile(scope=loss)`: the loss and the model in it are one compiled function, which `kp.fused_loss` calls."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import kernel_pytorch as kp
from kernel_pytorch.core.program import begin, ship
from kernel_pytorch.core.types import Mode, Step
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError, InputsError, ModelError
from kernel_pytorch.transforms.compile import Compile

STEP = Step("compile", {"mode": "default", "scope": "loss"})


class Classifier(nn.Module):
    """Returns its loss and its logits, as Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 50)
        self.scale = 2.0

    def forward(self, x, labels):
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


BATCH = {"x": torch.randn(4, 6), "labels": torch.arange(4)}


@pytest.fixture
def graphs(monkeypatch):
    """Compile to graphs that run as they are, and keep them."""
    kept = []
    original = torch.compile

    def keep(graph, inputs):
        del inputs
        kept.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda f, **_: original(f, backend=keep, fullgraph=True))
    return kept


def shipped(model, step=STEP, loss=None, around=None):
    program = begin(model, Mode.TRAINING, {"main": Call((), BATCH)}, loss=loss)
    if around is not None:
        program.call = around(program.call)
    return ship(Compile().apply(program, step), model)


def test_the_logits_are_no_output_and_the_gradients_are_the_same(graphs) -> None:
    model = Classifier()
    same = copy.deepcopy(model)
    shipped(model)
    loss = kp.fused_loss(model, BATCH)
    loss.backward()
    same(**BATCH)["loss"].backward()
    assert torch.allclose(model.head.weight.grad, same.head.weight.grad)
    assert kp.call_counts(model).inside == 1
    (graph,) = graphs
    (output,) = graph.graph.find_nodes(op="output")
    assert [node.meta["example_value"].shape for node in output.args[0]] == [()]


def test_a_loss_of_ones_own_and_attributes_of_the_model(graphs) -> None:
    model = Classifier()
    want = 2.0 * model(**BATCH)["logits"].square().mean()
    shipped(model, loss=lambda m, batch: m.scale * m(**batch)["logits"].square().mean())
    assert torch.allclose(kp.fused_loss(model, BATCH), want)
    assert len(graphs) == 1


def test_what_earlier_steps_put_around_the_call_is_inside(graphs) -> None:
    model = Classifier()

    def halved(inner):
        return lambda **kwargs: {"loss": inner(**kwargs)["loss"] / 2}

    want = model(**BATCH)["loss"] / 2
    shipped(model, around=halved)
    assert torch.allclose(kp.fused_loss(model, BATCH), want)


def test_calls_outside_the_plan_run_the_loss_as_usual(graphs) -> None:
    model = Classifier()
    shipped(model)
    with torch.no_grad():
        kp.fused_loss(model, BATCH)
    model.eval()
    kp.fused_loss(model, BATCH)
    assert not graphs
    assert kp.call_counts(model).outside == 2
    with pytest.raises(ModelError, match="no plan"):
        kp.fused_loss(Classifier(), BATCH)


def test_a_plan_without_it_takes_the_loss_as_usual(graphs) -> None:
    model = shipped(Classifier(), Step("compile", {"mode": "default"}))
    assert kp.fused_loss(model, BATCH).requires_grad
    assert len(graphs) == 1
    with pytest.raises(InputsError, match="needs a loss") as caught:
        kp.fused_loss(shipped(nn.Linear(3, 2), Step("compile", {"mode": "default"})), torch.ones(1, 3))
    assert "kp.prepare" in caught.value.fix


@pytest.mark.parametrize(
    ("mode", "params", "words"),
    [
        (Mode.INFERENCE, {"scope": "loss"}, "for training"),
        (Mode.TRAINING, {"scope": "step"}, "unknown scope"),
        (Mode.TRAINING, {"scope": "loss", "mode": "reduce-overhead"}, "kp.TrainStep"),
    ],
)
def test_what_it_is_not_for(mode, params, words) -> None:
    with pytest.raises(CandidateError, match=words):
        Compile().apply(begin(Classifier(), mode, {}), Step("compile", params))


def test_training_proposes_it_first() -> None:
    from tests.unit.plan_factory import make_plan

    plan = make_plan()
    import dataclasses

    device = dataclasses.replace(plan.device, features=("cxx_compiler",))
    steps = Compile().propose(dataclasses.replace(plan.workload, mode=Mode.TRAINING), device)
    assert steps[:2] == [STEP, Step("compile", {"mode": "default"})]
    assert STEP not in Compile().propose(dataclasses.replace(plan.workload, mode=Mode.INFERENCE), device)


def test_the_ejected_source_runs(graphs) -> None:
    names = {"torch": torch}
    exec(Compile().source(STEP), {**names, "call": lambda x: x}, names)
    assert callable(names["fused_loss"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_loss_that_casts_is_judged_by_what_its_cast_costs() -> None:
    """`.float()` in a loss that is compiled with the model cannot be lifted: that is rounding, not another function."""
    from kernel_pytorch.backends import manager_for
    from kernel_pytorch.search.bench import prepare_bench
    from kernel_pytorch.search.trial import TrialRequest, run_trial

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.head = nn.Embedding(64, 32), nn.Linear(32, 64), nn.Linear(64, 64)

        def forward(self, ids):
            return self.head(torch.tanh(self.up(self.embed(ids))))

    def loss(model, ids):
        return nn.functional.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten())

    workload = kp.Workload(Tokens, lambda seed: torch.randint(64, (2, 8)), loss=loss)
    bench = prepare_bench(workload, kp.KernelPyTorchConfig.for_training(), manager_for("cpu"), seed=0)
    trial = run_trial(bench, TrialRequest(kp.Candidate((STEP,)), seconds=0.5))
    failed = [c for c in trial.numerics.checks if not c.passed] if trial.numerics else trial.reason
    assert trial.status == "ok", failed
