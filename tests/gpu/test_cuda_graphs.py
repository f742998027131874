"""CUDA graphs on a real device: inference calls and whole training steps against the same thing uncaptured."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.core.program import begin, clone_model, plain_call, restore, ship
from kernel_pytorch.core.types import Mode, Step
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.train_step import TrainStep
from kernel_pytorch.transforms.bucketing import Bucketing
from kernel_pytorch.transforms.compile import Compile
from kernel_pytorch.transforms.cuda_graph import CudaGraph, Recorder
from kernel_pytorch.transforms.precision_policy import PrecisionPolicy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*_stable_hash_for_caching:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*TensorFloat32 tensor cores:UserWarning"),
]
GRAPH = Step("cuda_graph")


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 32)
        self.norm = nn.LayerNorm(32)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.drop(torch.relu(self.norm(self.inner(x))))
        return {"hidden": hidden, "out": self.head(hidden)}


def net(dropout: float = 0.0) -> Net:
    torch.manual_seed(0)
    return Net(dropout).cuda()


def inputs(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed)).cuda()


def graphed(model: nn.Module, *steps: Callable[[Any], Any]) -> tuple[nn.Module, Any]:
    program = begin(model, Mode.INFERENCE, {"a": Call((inputs(4),)), "b": Call((inputs(6),))})
    for step in steps:
        program = step(program)
    program = CudaGraph().apply(program, GRAPH)
    assert not program.dynamic
    return ship(program, clone_model(model)), program


@torch.no_grad()
def test_replays_equal_the_model_and_outputs_stay() -> None:
    model = net().eval()
    original = clone_model(model)
    shipped, _ = graphed(model)
    kept = []
    for seed in range(6):
        x = inputs(4 if seed % 2 else 6, seed)
        got, want = shipped(x), original(x)
        assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}
        kept.append((got, want))
    torch.cuda.synchronize()
    for got, want in kept:
        assert all(torch.equal(got[name], want[name]) for name in want)
    with torch.inference_mode():
        assert torch.equal(shipped(inputs(4, 9))["out"], original(inputs(4, 9))["out"])
    restore(shipped)
    assert torch.equal(shipped(inputs(4, 9))["out"], original(inputs(4, 9))["out"])


@torch.no_grad()
def test_weights_changed_in_place_are_seen_and_replaced_ones_recorded_again() -> None:
    model = net().eval()
    shipped, program = graphed(model)
    x = inputs(4)
    shipped(x)
    shipped.inner.weight.mul_(2)
    shipped.load_state_dict({k: v + 0.1 for k, v in shipped.state_dict().items()})
    assert torch.equal(shipped(x)["out"], plain_call(shipped)(x)["out"])
    assert program.notes == []
    shipped.head.weight = nn.Parameter(torch.ones_like(shipped.head.weight))
    torch.cuda.empty_cache()
    assert torch.equal(shipped(x)["out"], plain_call(shipped)(x)["out"])
    shipped.head.bias.data = torch.ones_like(shipped.head.bias)
    assert torch.equal(shipped(x)["out"], plain_call(shipped)(x)["out"])
    assert len(program.notes) == 2


@torch.no_grad()
def test_replays_draw_new_random_numbers_and_repeat_under_a_seed() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 512)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(self.inner(x), 0.5, training=True)

    shipped, _ = graphed(Noisy().cuda().eval())
    x = inputs(4)
    torch.manual_seed(7)
    before = torch.cuda.get_rng_state()
    want = plain_call(shipped)(x)
    torch.cuda.set_rng_state(before)
    first = shipped(x)
    second = shipped(x)
    assert torch.equal(first, want)
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    assert torch.equal(shipped(x), first)


@torch.no_grad()
def test_what_cannot_be_recorded_is_told_and_the_device_works_on() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x)
            return y * 2 if y.sum().item() > 0 else y  # the host asks

    shipped, _ = graphed(Asks().cuda().eval())
    with pytest.raises(CandidateError, match=r"the host waits for the device at .*the host asks"):
        shipped(inputs(4))

    class HostRandom(Asks):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * torch.rand(1).item()

    shipped, _ = graphed(HostRandom().cuda().eval())
    with pytest.raises(CandidateError, match="random numbers on the host"):
        shipped(inputs(4))
    shipped, _ = graphed(net().eval())
    with pytest.raises(CandidateError, match="an input is on cpu and the model on cuda:0"):
        shipped(inputs(4).cpu())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_a_transformer_that_looks_at_its_mask_when_uncaptured_is_recorded() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.BertModel(config).cuda().eval()
    call = Call(
        (), {"input_ids": torch.arange(24).view(2, 12).cuda(), "attention_mask": torch.ones(2, 12).long().cuda()}
    )
    call.kwargs["attention_mask"][1, 6:] = 0
    program = CudaGraph().apply(begin(model, Mode.INFERENCE, {"main": call}), GRAPH)
    shipped = ship(program, clone_model(model))
    want = plain_call(model)(**call.kwargs).last_hidden_state
    for _ in range(3):
        got = shipped(**call.kwargs).last_hidden_state
        assert torch.allclose(got[0], want[0], atol=1e-4)
        assert torch.allclose(got[1, :6], want[1, :6], atol=1e-4)


@torch.no_grad()
def test_buckets_share_recordings() -> None:
    model = net().eval()
    original = clone_model(model)
    program = begin(model, Mode.INFERENCE, {"main": Call((inputs(5),))})
    program = CudaGraph().apply(program, GRAPH)
    recorded = program.call
    program = Bucketing().apply(program, Step("bucketing", {"dims": "batch"}))
    shipped = ship(program, original)
    for rows in (5, 6, 7, 8, 3):
        got, want = shipped(inputs(rows, rows)), original(inputs(rows, rows))
        assert all(torch.allclose(got[name], want[name], atol=1e-4) for name in want)
        assert all(got[name].shape == want[name].shape for name in want)
    assert len(recorded._recorded) == 2


def test_a_capture_that_fails_leaves_everything_usable() -> None:
    recorder = Recorder(torch.device("cuda", torch.cuda.current_device()))
    x = torch.ones(8, device="cuda")
    recorder.warm_up(lambda: x + 1)
    before = torch.cuda.current_stream()
    with pytest.raises(CandidateError, match=r"cannot be recorded as a CUDA graph: .*test_cuda_graphs\.py"):
        recorder.capture(lambda: (x + torch.rand_like(x)).sum().item())
    assert torch.cuda.current_stream() == before
    torch.cuda.synchronize()
    assert torch.rand(4, device="cuda").shape == (4,)
    torch.cuda.empty_cache()
    replay = recorder.capture(lambda: x * 2)
    x.fill_(3.0)
    assert torch.equal(replay(), torch.full_like(x, 6.0))
    torch.cuda.empty_cache()


@torch.no_grad()
def test_ejected_source_replays() -> None:
    model = net().eval()
    names: dict[str, Any] = {"model": model, "call": plain_call(model)}
    exec(CudaGraph().source(GRAPH), names)
    for seed in range(4):
        x = inputs(4 + seed % 2, seed)
        assert torch.equal(names["call"](x)["out"], model(x)["out"])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_a_graph_around_compiled_code() -> None:
    model = net().eval()
    original = clone_model(model)
    shipped, _ = graphed(model, lambda p: Compile().apply(p, Step("compile", {"mode": "default"})))
    for seed in range(4):
        x = inputs(4, seed)
        assert torch.allclose(shipped(x)["out"], original(x)["out"], atol=1e-3)


@torch.no_grad()
def test_replays_from_two_streams_do_not_overtake_each_other() -> None:
    model = net().eval()
    original = clone_model(model)
    shipped, _ = graphed(model)
    shipped(inputs(4))
    other = torch.cuda.Stream()
    for seed in range(8):
        x, y = inputs(4, seed), inputs(4, seed + 100)
        torch.cuda.synchronize()
        a = shipped(x)
        with torch.cuda.stream(other):
            b = shipped(y)
        torch.cuda.synchronize()
        assert torch.equal(a["out"], original(x)["out"])
        assert torch.equal(b["out"], original(y)["out"])


def loss(model: Any, batch: Any) -> torch.Tensor:
    return (model(batch["x"])["out"] - batch["y"]).square().mean()


def batches(count: int, rows: int = 8) -> list[dict[str, torch.Tensor]]:
    return [{"x": inputs(rows, i), "y": inputs(rows, i + 50)[:, :8].contiguous()} for i in range(count)]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused_adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.01),
}


def by_hand(
    net: nn.Module, optimizer: Any, scheduler: Any, data: Any, accumulate: int, clip: Any
) -> list[torch.Tensor]:
    losses = []
    for i, batch in enumerate(data, 1):
        value = loss(net, batch)
        (value / accumulate).backward()
        losses.append(value.detach())
        if i % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return losses


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(("accumulate", "clip", "dropout"), [(1, None, 0.0), (1, 0.2, 0.1), (3, 0.2, 0.1)])
def test_a_recorded_step_trains_as_the_loop_does(
    kind: str, accumulate: int, clip: float | None, dropout: float
) -> None:
    ours, theirs = net(dropout).train(), net(dropout).train()
    mine, other = OPTIMIZERS[kind](ours.parameters()), OPTIMIZERS[kind](theirs.parameters())
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (mine, other)]
    flags = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in mine.param_groups]
    step = TrainStep(ours, loss, mine, accumulate=accumulate, clip_norm=clip, scheduler=schedules[0])
    data = batches(24) + batches(12, rows=6)
    torch.manual_seed(3)
    got = torch.stack([step(batch) for batch in data])
    torch.manual_seed(3)
    want = torch.stack(by_hand(theirs, other, schedules[1], data, accumulate, clip))
    assert step.reason == ""
    assert step.recordings == (2 if accumulate == 1 else 4)
    assert torch.allclose(got, want, rtol=2e-3, atol=1e-5)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-2, atol=2e-4)
    assert mine.param_groups[0]["lr"] == pytest.approx(other.param_groups[0]["lr"])
    assert [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in mine.param_groups] == flags
    # After release the optimizer goes on in the plain loop, from the same state.
    step.release()
    if kind == "adamw":
        assert {s["step"].device.type for s in mine.state.values()} == {"cpu"}
    for network, optimizer in ((ours, mine), (theirs, other)):
        torch.manual_seed(4)
        loss(network, data[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-2, atol=2e-4)


def test_a_running_optimizer_is_taken_over_and_given_back() -> None:
    ours = net().train()
    optimizer = OPTIMIZERS["adamw"](ours.parameters())
    loss(ours, batches(1)[0]).backward()
    optimizer.step()
    optimizer.zero_grad()
    counter = next(iter(optimizer.state.values()))["step"]
    assert counter.device.type == "cpu"
    step = TrainStep(ours, loss, optimizer)
    for batch in batches(6):
        step(batch)
    assert next(iter(optimizer.state.values()))["step"].is_cuda
    step.release()
    assert {s["step"].device.type for s in optimizer.state.values()} == {"cpu"}
    assert {float(s["step"]) for s in optimizer.state.values()} == {7.0}


def test_the_learning_rate_is_read_at_each_replay() -> None:
    ours = net().train()
    optimizer = OPTIMIZERS["adamw"](ours.parameters())
    step = TrainStep(ours, loss, optimizer)
    for _ in range(4):
        step(batches(1)[0])
    assert step.recordings == 1
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.clone() for p in ours.parameters()]
    step(batches(1)[0])
    assert all(torch.equal(p, q) for p, q in zip(before, ours.parameters(), strict=True))
    optimizer.param_groups[0]["lr"] = 1e-2
    step(batches(1)[0])
    assert not any(torch.equal(p, q) for p, q in zip(before, ours.parameters(), strict=True))
    assert step.recordings == 1


def test_dropout_differs_between_replays() -> None:
    ours = net(dropout=0.5).train()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.0)
    step = TrainStep(ours, loss, optimizer)
    batch = batches(1)[0]
    values = [step(batch).item() for _ in range(10)]
    assert step.reason == ""
    assert len(set(values)) == len(values)


def test_replaced_parameters_and_a_loaded_optimizer_are_recorded_again() -> None:
    ours, theirs = net().train(), net().train()
    mine, other = OPTIMIZERS["adamw"](ours.parameters()), OPTIMIZERS["adamw"](theirs.parameters())
    step = TrainStep(ours, loss, mine)
    data = batches(6)
    for phase in range(3):
        for batch in data:
            step(batch)
            loss(theirs, batch).backward()
            other.step()
            other.zero_grad()
        assert step.recordings == 1
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-2, atol=2e-4)
        if phase == 0:
            saved = copy.deepcopy(mine.state_dict())
            mine.load_state_dict(saved)
        else:
            for p in ours.parameters():
                p.data = p.data.clone()
    assert step.reason == ""


def test_a_step_that_asks_the_device_goes_on_uncaptured(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = net().train(), net().train()
    mine, other = OPTIMIZERS["adamw"](ours.parameters()), OPTIMIZERS["adamw"](theirs.parameters())

    def asking(model: Any, batch: Any) -> torch.Tensor:
        value = loss(model, batch)
        return value * 1 if value.item() > 0 else value

    step = TrainStep(ours, asking, mine)
    with caplog.at_level(logging.WARNING):
        for batch in batches(6):
            step(batch)
            loss(theirs, batch).backward()
            other.step()
            other.zero_grad()
    assert "the host waits for the device at" in step.reason
    assert "value.item()" in step.reason
    assert len([r for r in caplog.records if r.name == "kernel_pytorch.train_step"]) == 1
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("policy", ["master_weights", "pure_bf16"])
def test_precision_policies_are_recorded(policy: str) -> None:
    def shipped() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = net().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        program = begin(model, Mode.TRAINING, {}, optimizer=optimizer)
        step = Step("precision_policy", {"policy": policy, "to": "bfloat16"})
        return ship(PrecisionPolicy().apply(program, step), model), optimizer

    ours, mine = shipped()
    theirs, other = shipped()
    step = TrainStep(ours, loss, mine)
    got, want = [], []
    for batch in batches(10):
        got.append(step(batch))
        value = loss(theirs, batch)
        value.backward()
        other.step()
        other.zero_grad()
        want.append(value.detach())
    assert step.reason == ""
    assert torch.allclose(torch.stack(got), torch.stack(want), rtol=2e-2)
    assert {v.dtype for v in ours.state_dict().values()} == {torch.float32}
