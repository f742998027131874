"""The logic around CUDA graphs, with a recorder that replays by running again; graphs themselves: tests/gpu."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kernel_pytorch.core.program import begin
from kernel_pytorch.core.types import DeviceSpec, Mode, OperatorShare, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms import cuda_graph
from kernel_pytorch.transforms.cuda_graph import CudaGraph, Graphed, Pointers, Unrecordable, signature

GPU = DeviceSpec("nvidia", "a GPU", "sm_90", 1, 1, ("cuda", "cuda_graphs"), {}, 1.0, {})
SPEC = WorkloadSpec("m", "", Mode.INFERENCE, {}, {}, 1, 4, 0, ("float32",), {}, {}, {})


class Again:
    """Replays by running once more into the tensors of the first run, as a graph would fill them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.captures = 0
        self.reason = ""

    def warm_up(self, run: Callable[[], Any]) -> Any:
        return run()

    def inspect(self, run: Callable[[], Any]) -> tuple[Any, str]:
        return run(), self.reason

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        self.captures += 1
        out = run()

        def replay() -> Any:
            for held, new in zip(_tensors(out), _tensors(run()), strict=True):
                held.copy_(new)
            return out

        return replay


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def recorded(model: nn.Module, call: Callable[..., Any] | None = None) -> tuple[Graphed, list[Again], list[str]]:
    made: list[Again] = []

    def make(device: torch.device) -> Again:
        made.append(Again(device))
        return made[-1]

    notes: list[str] = []
    return Graphed(call or model, model, notes, recorder=make), made, notes


@torch.no_grad()
def test_outputs_are_the_callers_own_and_inputs_are_copied_in() -> None:
    model = nn.Linear(3, 2)
    run, made, _ = recorded(model, lambda x, scale=1: {"y": model(x) * scale, "x": x})
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    first = run(a)
    kept = first["y"].clone()
    second = run(b)
    assert torch.equal(first["y"], kept)
    assert torch.equal(kept, model(a))
    assert torch.equal(second["y"], model(b))
    assert torch.equal(second["x"], b)
    assert made[0].captures == 1
    run(torch.randn(5, 3))
    assert torch.equal(run(a, scale=2)["y"], model(a) * 2)
    assert made[0].captures == 3


@torch.no_grad()
def test_values_changed_in_place_are_seen_and_replaced_tensors_are_recorded_again() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    run, made, notes = recorded(model)
    x = torch.randn(4, 3)
    run(x)
    model[0].weight.mul_(2)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    assert torch.equal(run(x), model(x))
    assert len(made) == 1
    changes: list[Callable[[], Any]] = [
        lambda: setattr(model[0], "weight", nn.Parameter(torch.ones(3, 3))),
        lambda: setattr(model[0].weight, "data", torch.full((3, 3), 2.0)),
        lambda: setattr(model[1], "running_mean", torch.ones(3)),
        lambda: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True),
        lambda: setattr(model, "0", nn.Linear(3, 3)),
    ]
    for times, change in enumerate(changes, 2):
        change()
        assert torch.equal(run(x), model(x))
        assert len(made) == times
    assert notes == ["parameters were replaced: the CUDA graphs were recorded again"] * len(changes)


@torch.no_grad()
def test_what_would_be_repeated_wrongly_is_refused() -> None:
    model = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    with pytest.raises(CandidateError, match="changes an input in place"):
        recorded(model, lambda x: model(x.mul_(1)))[0](x)
    with pytest.raises(CandidateError, match="returns a object"):
        recorded(model, lambda x: (model(x), {"cache": object()}))[0](x)
    with pytest.raises(CandidateError, match="type object would be frozen"):
        recorded(model)[0](x, object())
    with pytest.raises(CandidateError, match="an input is on meta and the model on cpu"):
        recorded(model)[0](torch.randn(4, 3, device="meta"))
    run, made, _ = recorded(model, lambda x: model(x))
    run(x)
    made[0].reason = "the host waits for the device at here"
    with pytest.raises(CandidateError, match="the host waits for the device at here"):
        run(torch.randn(1, 3))


@torch.no_grad()
def test_buffers_are_as_they_were_before_warming_up() -> None:
    model = nn.BatchNorm1d(3).train()
    run, _, _ = recorded(model)
    x = torch.randn(4, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    recorder = Again(torch.device("cpu"))
    recorder.capture = lambda run: lambda: torch.zeros(1)  # type: ignore[method-assign, assignment]
    run._make = lambda device: recorder
    run(x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def test_calls_in_inference_mode_leave_buffers_that_later_calls_can_write() -> None:
    model = nn.Linear(3, 2)
    run, made, _ = recorded(model)
    with torch.inference_mode():
        run(torch.ones(4, 3))
    x = torch.randn(4, 3)
    assert torch.equal(run(x), model(x))
    assert made[0].captures == 1


@torch.no_grad()
def test_release_forgets_and_records_again() -> None:
    model = nn.Linear(3, 2)
    run, made, notes = recorded(model)
    run(torch.ones(4, 3))
    run.release()
    run(torch.ones(4, 3))
    assert len(made) == 2
    assert notes == []


def test_a_signature_tells_layouts_values_and_types_apart() -> None:
    x = torch.ones(4, 4)
    leaves = [[x], [x.t().contiguous().t()], [x.double()], [x[:2]], [x, 1], [x, True], [x, 1.0], [x, "1"]]
    keys = [signature(leaf, None) for leaf in leaves]
    assert len(set(keys)) == len(keys)
    assert signature([x.clone()], None) == keys[0]
    with torch.autocast("cuda", torch.bfloat16) if torch.cuda.is_available() else _cuda_autocast():
        assert signature([x], None) != keys[0]


class _cuda_autocast:
    """`torch.autocast("cuda")` refuses to enter without CUDA; its state can be set all the same."""

    def __enter__(self) -> None:
        torch.set_autocast_enabled("cuda", True)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_enabled("cuda", False)


def test_random_numbers_of_the_host_are_noticed() -> None:
    for draw in (lambda: torch.rand(1), random.random, np.random.rand):
        before = cuda_graph._host_random_state()
        assert cuda_graph._host_random_state() == before
        draw()
        assert cuda_graph._host_random_state() != before


def test_code_that_asks_is_told_that_it_is_captured() -> None:
    real = torch.cuda.is_current_stream_capturing
    with cuda_graph._as_if_capturing():
        assert torch.cuda.is_current_stream_capturing() is True
    assert torch.cuda.is_current_stream_capturing is real
    with pytest.raises(KeyError), cuda_graph._as_if_capturing():
        raise KeyError
    assert torch.cuda.is_current_stream_capturing is real


def test_the_first_cause_is_told_with_the_users_line() -> None:
    def fail() -> None:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")  # the line told
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904

    with pytest.raises(RuntimeError) as caught:
        fail()
    told = cuda_graph._told(cuda_graph._first(caught.value))
    assert told.startswith("operation not permitted when stream is capturing at ")
    assert "test_cuda_graph.py" in told
    assert "# the line told" in told


def test_pointers_watch_the_optimizers_state() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3), foreach=False)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    watch = Pointers(model, optimizer)
    optimizer.step()
    assert not watch.moved()
    optimizer.load_state_dict(optimizer.state_dict())
    assert watch.moved()
    watch = Pointers(model, optimizer)
    optimizer.state[model.weight]["exp_avg"] = torch.zeros(2, 2)
    assert watch.moved()


def test_the_step_is_for_machines_and_models_that_have_graphs() -> None:
    transform = CudaGraph()
    assert transform.propose(SPEC, GPU) == [Step("cuda_graph")]
    for device in (replace(GPU, vendor="cpu"), replace(GPU, features=("cuda",)), replace(GPU, vendor="tpu")):
        assert isinstance(transform.propose(SPEC, device), Skip)
    assert isinstance(transform.propose(replace(SPEC, mode=Mode.TRAINING), GPU), Skip)
    shares = (OperatorShare("overhead", 0.75, 1, 0.0, 0.0), OperatorShare("matmul", 0.25, 1, 0.0, 0.0))
    prediction = Prediction(1.0, 1.0, 0.0, 0.0, shares, {})
    assert transform.ceiling(Step("cuda_graph"), prediction, GPU) == pytest.approx(4.0)
    program = begin(nn.Linear(2, 2), Mode.INFERENCE, {"main": Call((torch.ones(1, 2),))})
    with pytest.raises(CandidateError, match="no CUDA graphs on cpu"):
        transform.apply(program, Step("cuda_graph"))
    program.holds.append(Unrecordable(Step("compile", {"mode": "reduce-overhead"}), "it makes graphs of its own"))
    with pytest.raises(CandidateError, match=r"cannot follow compile\(mode=reduce-overhead\): it makes graphs"):
        transform.apply(program, Step("cuda_graph"))
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    assert "no CUDA graphs on" in cuda_graph.no_graphs_on(mixed)
    assert "no parameters" in cuda_graph.no_graphs_on(nn.ReLU())


def test_source_is_plain_pytorch() -> None:
    text = CudaGraph().source(Step("cuda_graph"))
    assert "kernel_pytorch" not in text
    assert "torch.cuda.CUDAGraph()" in text
    compile(text, "source", "exec")
