"""One step as one call: the plain path against loops written by hand, and the logic around recordings."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.core.program import begin, ship
from kernel_pytorch.core.types import Mode, Step
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.train_step import TrainStep, _unrecordable
from kernel_pytorch.transforms.cuda_graph import Unrecordable

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))


def loss(net: Any, batch: Any) -> torch.Tensor:
    return (net(batch["x"]) - batch["y"]).square().mean()


def batches(count: int, rows: int = 6) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(rows, 4, generator=g), "y": torch.randn(rows, 2, generator=g)} for _ in range(count)]


def by_hand(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    data: list[Any],
    *,
    accumulate: int,
    clip: float | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    losses, norms = [], []
    for i, batch in enumerate(data, 1):
        value = loss(net, batch)
        (value / accumulate).backward()
        losses.append(value.detach())
        if i % accumulate == 0:
            if clip is not None:
                norms.append(nn.utils.clip_grad_norm_(net.parameters(), clip))
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
    return losses, norms


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (1, 0.1), (3, None), (2, 0.1)])
def test_a_step_is_the_loop_written_by_hand(kind: str, accumulate: int, clip: float | None) -> None:
    ours, theirs = model(), model()
    mine, other = OPTIMIZERS[kind](ours.parameters()), OPTIMIZERS[kind](theirs.parameters())
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(mine, T_max=6)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(other, T_max=6)
    data = batches(6)
    step = TrainStep(ours, loss, mine, accumulate=accumulate, clip_norm=clip, scheduler=cosine)
    assert step.reason == "no CUDA graphs on cpu"
    torch.manual_seed(5)
    got, norms = [], []
    for batch in data:
        value = step(batch)
        assert not value.requires_grad
        got.append(value)
        if clip is not None and step.updates > len(norms):
            norms.append(step.grad_norm)
    torch.manual_seed(5)
    want, clipped = by_hand(theirs, other, schedule, data, accumulate=accumulate, clip=clip)
    assert step.updates == 6 // accumulate
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(norms, clipped, strict=True))
    assert mine.param_groups[0]["lr"] == other.param_groups[0]["lr"]
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert all(p.grad is None for p in ours.parameters())


def test_flush_updates_with_what_was_accumulated() -> None:
    ours, theirs = model(), model()
    mine, other = OPTIMIZERS["sgd"](ours.parameters()), OPTIMIZERS["sgd"](theirs.parameters())
    step = TrainStep(ours, loss, mine, accumulate=4)
    data = batches(2)
    torch.manual_seed(5)
    for batch in data:
        step(batch)
    assert step.updates == 0
    step.flush()
    step.flush()
    assert step.updates == 1
    torch.manual_seed(5)
    for batch in data:
        (loss(theirs, batch) / 4).backward()
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_arguments_that_cannot_be_used_are_told() -> None:
    net = model()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    for words, change in (
        ("accumulate must be 1 or more, got 0", {"accumulate": 0}),
        ("clip_norm must be positive", {"clip_norm": 0.0}),
        ("steps on a metric", {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)}),
    ):
        with pytest.raises(ValueError, match=words):
            TrainStep(net, loss, optimizer, **change)
    with pytest.raises(ValueError, match="needs a closure"):
        TrainStep(net, loss, torch.optim.LBFGS(net.parameters()))
    with pytest.raises(ValueError, match=r"must return a scalar, got shape \(6, 2\)"):
        TrainStep(net, lambda m, b: m(b["x"]), optimizer)(batches(1)[0])
    assert TrainStep(net, loss, optimizer, graph=False).reason == "graph=False"


class Again:
    """Replays by running: what recording does to the optimizer and the gradients is real, the graph is not."""

    def __init__(self, device: torch.device) -> None:
        self.reason = ""
        self.error: Exception | None = None
        self.ran: list[str] = []

    def warm_up(self, run: Callable[[], Any]) -> Any:
        self.ran.append("warm_up")
        return run()

    def inspect(self, run: Callable[[], Any]) -> tuple[Any, str]:
        self.ran.append("inspect")
        return run(), self.reason

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        self.ran.append("capture")
        if self.error:
            raise self.error

        def replay() -> Any:
            self.ran.append("replay")
            return self.around(run)

        return replay

    @staticmethod
    def around(run: Callable[[], Any]) -> Any:
        return run()


def recording(step: TrainStep) -> list[Again]:
    made: list[Again] = []

    def make(device: torch.device) -> Again:
        made.append(Again(device))
        # A graph replays the kernels of a capturable optimizer; this stand-in has to put it in that state again.
        made[-1].around = lambda run: _capturing(step, run)  # type: ignore[method-assign]
        return made[-1]

    assert step.reason == "no CUDA graphs on cpu"
    step.reason, step._make = "", make
    return made


def _capturing(step: TrainStep, run: Callable[[], Any]) -> Any:
    with step._capturing_optimizer():
        return run()


def test_recorded_steps_follow_shapes_schedule_and_replaced_parameters() -> None:
    ours, theirs = model(), model()
    mine, other = OPTIMIZERS["sgd"](ours.parameters()), OPTIMIZERS["sgd"](theirs.parameters())
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (mine, other)]
    step = TrainStep(ours, loss, mine, clip_norm=0.5, scheduler=schedules[0])
    made = recording(step)
    data = batches(6) + batches(4, rows=3) + batches(2)
    torch.manual_seed(3)
    got = [step(batch) for batch in data]
    torch.manual_seed(3)
    want, norms = by_hand(theirs, other, schedules[1], data, accumulate=1, clip=0.5)
    assert step.reason == ""
    assert torch.allclose(torch.stack(got), torch.stack(want), atol=1e-5)
    assert torch.allclose(step.grad_norm, norms[-1], atol=1e-5)
    assert step.recordings == 2
    first = ["warm_up", "warm_up", "inspect", "capture", "replay"]
    assert made[0].ran == [*first, "replay", "replay", *first, "replay", "replay"]
    assert mine.param_groups[0]["lr"] == other.param_groups[0]["lr"]
    assert isinstance(mine.param_groups[0]["lr"], float)
    assert mine.param_groups[0]["fused"] is None
    ours[0].weight.data = ours[0].weight.data.clone()
    for batch in batches(4):
        step(batch)
    assert len(made) == 2
    assert made[1].ran == first
    mine.load_state_dict(mine.state_dict())
    step(data[0])
    assert len(made) == 3


def test_a_learning_rate_assigned_in_the_loop_reaches_the_recording() -> None:
    net = model()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    step = TrainStep(net, loss, optimizer)
    recording(step)
    for batch in batches(5):
        step(batch)
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.clone() for p in net.parameters()]
    step(batches(1)[0])
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert step._rates[0].item() == 0.0
    assert step.recordings == 1
    optimizer.param_groups[0]["momentum"] = 0.5
    for batch in batches(4):
        step(batch)
    assert step.recordings == 2


def test_accumulated_gradients_stay_in_place() -> None:
    ours, theirs = model(), model()
    mine, other = OPTIMIZERS["sgd"](ours.parameters()), OPTIMIZERS["sgd"](theirs.parameters())
    step = TrainStep(ours, loss, mine, accumulate=2)
    made = recording(step)
    data = batches(12)
    torch.manual_seed(3)
    got = [step(batch) for batch in data]
    held = [p.grad for p in ours.parameters()]
    torch.manual_seed(3)
    want, _ = by_hand(theirs, other, None, data, accumulate=2, clip=None)
    assert torch.allclose(torch.stack(got), torch.stack(want), atol=1e-6)
    assert step.recordings == 2
    assert made[0].ran.count("replay") == 6
    mine.zero_grad()
    step(data[0])
    assert all(p.grad is g for p, g in zip(ours.parameters(), held, strict=True))
    step.flush()
    assert all(p.grad is g and not g.any() for p, g in zip(ours.parameters(), held, strict=True))
    step.release()
    assert step.recordings == 0


def test_steps_that_cannot_be_recorded_go_on_uncaptured(caplog: pytest.LogCaptureFixture) -> None:
    for where in ("inspect", "capture", "memory"):
        ours, theirs = model(), model()
        mine, other = OPTIMIZERS["sgd"](ours.parameters()), OPTIMIZERS["sgd"](theirs.parameters())
        step = TrainStep(ours, loss, mine, accumulate=2)
        made = recording(step)
        data = batches(10)
        torch.manual_seed(3)
        got = [step(data[0])]
        if where == "inspect":
            made[0].reason = "the host waits"
        elif where == "capture":
            made[0].error = CandidateError("the host waits")
        else:
            made[0].error = torch.OutOfMemoryError("the host waits\nand more")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            got += [step(batch) for batch in data[1:]]
        assert step.reason == "the host waits"
        assert [r.getMessage() for r in caplog.records] == [
            "the training step runs without a CUDA graph: the host waits"
        ]
        torch.manual_seed(3)
        want, _ = by_hand(theirs, other, None, data, accumulate=2, clip=None)
        assert torch.allclose(torch.stack(got), torch.stack(want), atol=1e-6)


class Counting(torch.optim.Optimizer):
    """Keeps its step count in Python, as many optimizers outside PyTorch do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                p.sub_(p.grad, alpha=group["lr"] / state["count"])


def test_optimizers_that_a_graph_would_freeze_are_told() -> None:
    net = model()
    step = TrainStep(net, loss, Counting(net.parameters()))
    recording(step)
    for batch in batches(4):
        step(batch)
    assert step.reason == "Counting counts in Python (state 0: count), which a graph would freeze"
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    assert _unrecordable(net, optimizer) == ""
    optimizer.register_step_post_hook(lambda *_: None)
    assert "step hooks" in _unrecordable(net, optimizer)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    program = begin(net, Mode.TRAINING, {}, optimizer=optimizer)
    program.holds.append(Unrecordable(Step("compile", {"mode": "reduce-overhead"}), "it makes graphs of its own"))
    words = "the plan has compile(mode=reduce-overhead): it makes graphs of its own"
    assert _unrecordable(ship(program, net), optimizer) == words


def test_a_batch_elsewhere_and_ever_new_shapes_fall_out() -> None:
    net = model()
    step = TrainStep(net, loss, OPTIMIZERS["sgd"](net.parameters()))
    recording(step)
    for rows in range(2, 36):
        step(batches(1, rows)[0])
    assert "32 kinds of steps" in step.reason
    step = TrainStep(net, lambda m, b: loss(m, b) + 0 * b["y"].mean(), OPTIMIZERS["sgd"](net.parameters()))
    recording(step)
    with pytest.raises(CandidateError, match="a tensor of the batch is on meta: move it to cpu"):
        step._key([torch.ones(1, device="meta")], None, updates=True)


class Capturable(torch.optim.Optimizer):
    """Plain gradient descent with the setting that makes Adam count on the device."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, "capturable": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            assert group["capturable"]
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad


def test_settings_that_hold_during_a_step_only_are_no_counters() -> None:
    net = model()
    step = TrainStep(net, loss, Capturable(net.parameters()))
    made = recording(step)
    for batch in batches(5):
        step(batch)
    assert step.reason == ""
    assert "replay" in made[0].ran
    assert not step.optimizer.param_groups[0]["capturable"]
