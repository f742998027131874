"""The step of the kernel in the place of an optimizer's own: same object, state, hooks, schedule and closure."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import pytest
import torch
from tests.forks import run_interpreted
from torch import nn

from kernel_pytorch.core.program import begin, restore, ship
from kernel_pytorch.core.types import DeviceSpec, Mode, Skip, Step, WorkloadSpec
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.adamw import AdamW

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
kernels = pytest.mark.skipif(not INTERPRETED, reason="runs in the subprocess of test_kernels_under_the_interpreter")


@pytest.mark.skipif(INTERPRETED, reason="starts the subprocess")
def test_kernels_under_the_interpreter() -> None:
    run_interpreted(__file__)


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 33), nn.LayerNorm(33), nn.Linear(33, 3)).to(dtype)


def groups(model: nn.Module) -> list[dict[str, object]]:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    return [{"params": decayed}, {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]


def make(model: nn.Module, kind: type[torch.optim.Adam] = torch.optim.AdamW, **hyper: object) -> torch.optim.Optimizer:
    return kind(groups(model), **{"lr": 1e-2, "weight_decay": 0.1, **hyper})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, after: Callable[[], None] = int) -> None:
    dtype = next(model.parameters()).dtype
    for i in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(i)).to(dtype)
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
        after()


def apply(model: nn.Module, optimizer: torch.optim.Optimizer | None, step: Step | None = None) -> nn.Module:
    program = begin(model, Mode.TRAINING, {"main": Call((torch.ones(1, 6),))}, optimizer=optimizer)
    return ship(AdamW().apply(program, step or Step("adamw")), model)


def taken(model: nn.Module) -> int:
    return model._compiled_call_impl.program.holds[0].taken


def close(a: nn.Module, b: nn.Module, tolerance: float = 1e-6) -> bool:
    return all(torch.allclose(p, q, atol=tolerance) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def spec(vendor: str) -> DeviceSpec:
    return DeviceSpec(
        vendor=vendor, name="a device", arch="arch", memory_bytes=1, num_devices=1, features=(), peak_flops={},
        bandwidth_bytes_per_s=1.0, software={},
    )  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (lambda m: torch.optim.SGD(m.parameters()), "SGD is not"),
        (lambda m: None, "NoneType"),
        (lambda m: make(m, amsgrad=True), "amsgrad"),
        (make, "triton|Triton kernels run on cuda"),
    ],
)
def test_what_it_cannot_do_is_told(optimizer: Callable[[nn.Module], torch.optim.Optimizer], words: str) -> None:
    model = net()
    with pytest.raises(CandidateError, match=words):
        apply(model, optimizer(model))
    with pytest.raises(CandidateError, match="unknown parameters"):
        apply(model, make(model), Step("adamw", {"foreach": True}))


def test_it_has_no_plain_source() -> None:
    with pytest.raises(CandidateError, match="cannot be written as plain PyTorch"):
        AdamW().source(Step("adamw"))


def test_fp64_takes_the_own_step_of_pytorch_bit_for_bit() -> None:
    plain, model = net(torch.float64), net(torch.float64)
    own, mine = make(plain), make(model)
    shipped = apply(model, mine)
    train(plain, own, range(3))
    train(shipped, mine, range(3))
    assert taken(shipped) == 0
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))
    restore(shipped)
    assert "step" not in vars(mine)


@kernels
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("hyper", [{}, {"maximize": True}, {"lr": torch.tensor(1e-2)}, {"fused": True}])
def test_it_takes_over_a_running_optimizer_and_gives_it_back(
    kind: type[torch.optim.Adam], hyper: dict[str, object]
) -> None:
    plain, model = net(), net()
    own, mine = make(plain, kind, **hyper), make(model, kind, **hyper)
    train(plain, own, range(3))
    train(model, mine, range(3))
    shipped = apply(model, mine)
    train(plain, own, range(3, 8))
    train(shipped, mine, range(3, 8))
    assert taken(shipped) == 6
    assert close(plain, shipped)
    a, b = own.state_dict(), mine.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert {i: list(s) for i, s in a["state"].items()} == {i: list(s) for i, s in b["state"].items()}
    restore(shipped)
    assert "step" not in vars(mine)
    train(plain, own, range(8, 10))
    train(shipped, mine, range(8, 10))
    assert close(plain, shipped)


@kernels
@pytest.mark.parametrize("first", ["scheduler", "transform"])
def test_schedulers_hooks_and_closures_keep_working(first: str) -> None:
    plain, model = net(), net()
    own, mine = make(plain), make(model)
    seen: list[str] = []
    mine.register_step_pre_hook(lambda *_: seen.append("pre"))
    mine.register_step_post_hook(lambda *_: seen.append("post"))
    if first == "scheduler":
        schedule = torch.optim.lr_scheduler.ExponentialLR(mine, 0.5)
        shipped = apply(model, mine)
    else:
        shipped = apply(model, mine)
        schedule = torch.optim.lr_scheduler.ExponentialLR(mine, 0.5)
    train(plain, own, range(4), torch.optim.lr_scheduler.ExponentialLR(own, 0.5).step)
    train(shipped, mine, range(4), schedule.step)
    assert close(plain, shipped)
    assert seen == ["pre", "post"] * 4
    x = torch.ones(4, 6)

    def closure() -> torch.Tensor:
        mine.zero_grad()
        loss = shipped(x).square().mean()
        loss.backward()
        return loss

    assert torch.equal(mine.step(closure), shipped(x).square().mean()) is False
    restore(shipped)
    seen.clear()
    train(shipped, mine, range(4, 5), schedule.step)
    assert seen == ["pre", "post"]


@kernels
def test_state_goes_to_and_from_plain_pytorch() -> None:
    plain, model = net(), net()
    own, mine = make(plain), make(model)
    shipped = apply(model, mine)
    train(plain, own, range(5))
    train(shipped, mine, range(5))
    stored, weights = copy.deepcopy(mine.state_dict()), copy.deepcopy(model.state_dict())
    train(shipped, mine, range(5, 8))
    resumed, other = net(), net()
    resumed.load_state_dict(weights)
    other.load_state_dict(weights)
    back, again = make(resumed), make(other)
    again_shipped = apply(other, again)
    back.load_state_dict(copy.deepcopy(stored))
    again.load_state_dict(stored)
    train(resumed, back, range(5, 8))
    train(again_shipped, again, range(5, 8))
    assert close(resumed, shipped)
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), model.parameters(), strict=True))
    assert taken(again_shipped) == 6
    copied = copy.deepcopy(mine)
    assert "step" not in vars(copied)


@kernels
def test_what_the_kernel_cannot_take_goes_the_way_of_pytorch_beside_it() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.a = nn.Parameter(torch.randn(5, 6))
            self.b = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
            self.c = nn.Parameter(torch.randn(8, 8)[:, ::2].detach())
            self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
            self.unused = nn.Parameter(torch.randn(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ((x @ self.a.T).double() @ self.b[:5]).float() @ self.c[:4]

    plain, model = Mixed(), Mixed()
    model.c = nn.Parameter(plain.c.detach().clone(memory_format=torch.preserve_format))
    model.c.data = torch.empty(8, 8)[:, ::2].copy_(plain.c.detach())
    own, mine = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (plain, model))
    shipped = apply(model, mine)
    train(plain, own, range(4))
    train(shipped, mine, range(4))
    assert taken(shipped) == 1
    assert close(plain, shipped, 1e-5)


@kernels
def test_transposed_gradients_are_brought_to_the_format_of_the_parameter() -> None:
    plain, model = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    model.load_state_dict(plain.state_dict())
    own, mine = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (plain, model))
    shipped = apply(model, mine)
    for net_, optimizer in ((plain, own), (shipped, mine)):
        for parameter in net_.parameters():
            parameter.grad = torch.arange(parameter.numel(), dtype=torch.float32).view_as(parameter)
        net_.weight.grad = net_.weight.grad.to(memory_format=torch.channels_last)
        optimizer.step()
    assert taken(shipped) == 2
    assert close(plain, shipped)


@kernels
def test_a_grad_scaler_that_leaves_unscaling_to_the_optimizer_goes_the_way_of_pytorch() -> None:
    plain, model = net(), net()
    own, mine = make(plain, fused=True), make(model, fused=True)
    shipped = apply(model, mine)
    for optimizer in (own, mine):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    train(plain, own, range(2))
    train(shipped, mine, range(2))
    assert taken(shipped) == 0
    assert close(plain, shipped)


@kernels
def test_master_weights_follow_checkpoints_and_outside_changes() -> None:
    exact, model = net(), net(torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    mine = make(model, lr=1e-4)
    shipped = apply(model, mine, Step("adamw", {"master_weights": True}))
    train(shipped, mine, range(4))
    first = model[0].weight
    master = mine.state[first]["master"].clone()
    assert master.dtype is torch.float32
    assert torch.allclose(first.float(), master, rtol=2**-7)
    assert not torch.equal(first.float(), master)
    stored, weights = copy.deepcopy(mine.state_dict()), copy.deepcopy(model.state_dict())
    train(shipped, mine, range(4, 6))
    after = mine.state[first]["master"].clone()
    model.load_state_dict(weights)
    mine.load_state_dict(stored)
    assert torch.equal(mine.state[first]["master"], master)
    train(shipped, mine, range(4, 6))
    assert torch.equal(mine.state[first]["master"], after)
    with torch.no_grad():
        first.zero_()
    train(shipped, mine, range(6, 7))
    assert mine.state[first]["master"].abs().max() < 1e-3
    restore(shipped)
    assert "master" not in mine.state[first]


def test_who_is_offered_it() -> None:
    workload = WorkloadSpec(
        name="net", fingerprint="f", mode=Mode.TRAINING, signatures={}, weights={"main": 1.0}, parameters=10,
        parameter_bytes=40, buffer_bytes=0, dtypes=("bfloat16",), modules={}, blocks={}, operators={},
        devices=("cuda",), in_memory=True,
    )  # fmt: skip
    pytest.importorskip("triton", reason="triton is not installed")
    transform = AdamW()
    assert transform.propose(workload, spec("nvidia")) == [Step("adamw")]
    assert isinstance(transform.propose(workload, spec("cpu")), Skip)
    assert isinstance(transform.probe(spec("tpu")), Skip)
