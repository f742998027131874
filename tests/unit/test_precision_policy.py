"""Training in bfloat16: what is cast, what stays, and that training resumes and comes back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.core.program import begin, clone_model, plain_call, restore, ship
from kernel_pytorch.core.types import DeviceSpec, Mode, OperatorShare, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.compile import Compile
from kernel_pytorch.transforms.precision_policy import PrecisionPolicy

PURE = Step("precision_policy", {"policy": "pure_bf16", "to": "bfloat16"})
MASTERS = Step("precision_policy", {"policy": "master_weights", "to": "bfloat16"})
AUTOCAST = Step("precision_policy", {"policy": "autocast_bf16", "to": "bfloat16"})
CPU = DeviceSpec("cpu", "", "x86_64", 1, 1, ("avx512_bf16",), {}, 1.0, {})
SPEC = WorkloadSpec("m", "", Mode.TRAINING, {}, {}, 1, 4, 0, ("float32",), {}, {}, {})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.norm = nn.LayerNorm(8)
        self.batch = nn.BatchNorm1d(8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.full((8,), 0.3))
        self.register_buffer("seen", torch.zeros(8))
        self.register_buffer("inv_freq", torch.ones(2))

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.norm(self.embed(ids)) + self.shift
        x = self.batch(torch.relu(self.hidden(x)))
        self.dtype = x.dtype
        with torch.no_grad():
            self.seen.add_(1)
        return {"logits": self.head(x)}


def loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(ids)["logits"], ids)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def shipped(step: Step, *, trained: int = 0, fused: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    train(model, optimizer, trained)
    program = begin(model, Mode.TRAINING, {"main": Call((IDS,))}, optimizer=optimizer, loss=loss)
    return ship(PrecisionPolicy().apply(program, step), model), optimizer


IDS = torch.arange(10)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        value = loss(model, IDS)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("step", [PURE, MASTERS, AUTOCAST])
def test_training_follows_float32_and_the_checkpoint_keeps_its_format(step: Step) -> None:
    model, optimizer = shipped(step)
    plain = net()
    wide = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    want = train(plain, wide, 12)
    got = train(model, optimizer, 12)
    assert got != want
    assert want[-1] < 0.8 * want[0]
    assert torch.allclose(torch.tensor(got), torch.tensor(want), rtol=0.05)
    assert model(IDS)["logits"].dtype is torch.float32
    mine, theirs = model.state_dict(), plain.state_dict()
    assert list(mine) == list(theirs)
    assert {k: v.dtype for k, v in mine.items()} == {k: v.dtype for k, v in theirs.items()}
    assert mine["seen"][0] == 13
    assert mine["batch.num_batches_tracked"] == 13
    assert torch.allclose(mine["batch.running_mean"], theirs["batch.running_mean"], atol=0.05)


def test_masters_stay_float32_and_compute_is_bfloat16() -> None:
    model, optimizer = shipped(MASTERS)
    loss(model, IDS).backward()
    assert model.dtype is torch.bfloat16
    assert model.head.weight is model.embed.weight
    assert isinstance(model.hidden.weight, nn.Parameter)
    assert all(p.dtype is torch.float32 and p.grad.dtype is torch.float32 for p in model.parameters())
    plain = net()
    loss(plain, IDS).backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        apart = (p.grad - q.grad).norm() / q.grad.norm()
        assert apart < 0.05, name
    optimizer.step()
    assert all(s["exp_avg"].dtype is torch.float32 for s in optimizer.state.values())
    # An update of a part in a thousand is below bfloat16's resolution and must not be lost.
    before = model.hidden.weight.detach().clone()
    with torch.no_grad():
        model.hidden.weight.mul_(1.001)
    loss(model, IDS)
    assert torch.equal(model.hidden.weight, before * 1.001)


def test_masters_come_back_when_the_forward_raises() -> None:
    model, _ = shipped(MASTERS)
    with pytest.raises(IndexError):
        model(torch.tensor([99]))
    assert isinstance(model.hidden.weight, nn.Parameter)


def test_pure_state_is_bfloat16_but_for_running_statistics() -> None:
    model, optimizer = shipped(PURE, trained=2)
    hidden = model.hidden.weight
    assert hidden.dtype is torch.bfloat16
    assert model.inv_freq.dtype is torch.float32
    assert {t.dtype for t in (*model.batch.parameters(), model.batch.running_mean)} == {torch.float32}
    assert optimizer.state[hidden]["exp_avg"].dtype is torch.bfloat16
    assert optimizer.state[hidden]["step"] == 2
    train(model, optimizer, 1)
    assert model.hidden.weight is hidden
    assert model.head.weight is model.embed.weight


def test_pure_training_resumes_from_its_checkpoint() -> None:
    model, optimizer = shipped(PURE)
    train(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    want = train(model, optimizer, 3)
    again, other = shipped(PURE)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert train(again, other, 3) == want
    plain = net()
    plain.load_state_dict(saved[0])
    assert plain.hidden.weight.dtype is torch.float32


@pytest.mark.parametrize("fused", [False, True])
def test_undo_gives_the_values_back_bit_by_bit_or_trained(fused) -> None:
    for step in (PURE, MASTERS, AUTOCAST):
        model, optimizer = shipped(step, fused=fused)
        restore(model)
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), net().state_dict().values(), strict=True)
        )
        assert not model._state_dict_hooks
        model, optimizer = shipped(step, fused=fused)
        train(model, optimizer, 2)
        loss(model, IDS).backward()
        values = {k: v.clone() for k, v in model.state_dict().items()}
        restore(model)
        assert torch.equal(model.shift, net().shift)
        assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items() if k != "shift")
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        train(model, optimizer, 1)


def test_ejected_source_trains_the_same() -> None:
    for step in (PURE, MASTERS, AUTOCAST):
        model, optimizer = shipped(step)
        twin = net()
        names: dict[str, Any] = {"model": twin, "optimizer": torch.optim.AdamW(twin.parameters(), lr=1e-2)}
        names["call"] = plain_call(twin)
        exec(PrecisionPolicy().source(step), names)
        for _ in range(2):
            value = loss(names["call"], IDS)
            value.backward()
            names["optimizer"].step()
            names["optimizer"].zero_grad()
        train(model, optimizer, 2)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
        assert {v.dtype for k, v in twin.state_dict().items() if k != "batch.num_batches_tracked"} == {torch.float32}


def test_what_does_not_fit_is_told() -> None:
    transform = PrecisionPolicy()
    with pytest.raises(CandidateError, match="unknown policy 'x'"):
        transform.apply(begin(net(), Mode.TRAINING, {}), Step("precision_policy", {"policy": "x"}))
    with pytest.raises(CandidateError, match=r"is for float32 models; this one is torch\.bfloat16"):
        transform.apply(begin(net().bfloat16(), Mode.TRAINING, {}), MASTERS)
    with pytest.raises(CandidateError, match="second list of their weights"):
        transform.apply(begin(nn.LSTM(2, 2), Mode.TRAINING, {}), MASTERS)
    model = net()
    model.gradient_checkpointing = True
    with pytest.raises(CandidateError, match="recomputes after the call"):
        transform.apply(begin(model, Mode.TRAINING, {}), MASTERS)
    assert transform.propose(SPEC, CPU) == [MASTERS, PURE]
    from dataclasses import replace

    for spec, device in (
        (replace(SPEC, mode=Mode.INFERENCE), CPU),
        (replace(SPEC, dtypes=("bfloat16",)), CPU),
        (SPEC, replace(CPU, features=())),
    ):
        assert isinstance(transform.propose(spec, device), Skip)


def test_only_bfloat16_state_halves_the_optimizers_time() -> None:
    shares = (OperatorShare("elementwise", 0.5, 1, 0.0, 0.0), OperatorShare("optimizer", 0.5, 1, 0.0, 0.0))
    prediction = Prediction(1.0, 1.0, 0.0, 0.0, shares, {})
    assert PrecisionPolicy().ceiling(MASTERS, prediction, CPU) == pytest.approx(1 / 0.75)
    assert PrecisionPolicy().ceiling(PURE, prediction, CPU) == pytest.approx(2.0)


def test_a_copy_of_the_model_keeps_the_format() -> None:
    model, _ = shipped(PURE)
    assert clone_model(model).state_dict()["hidden.weight"].dtype is torch.float32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.filterwarnings("ignore:.*_stable_hash_for_caching:UserWarning")
def test_masters_compile() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 8))
    plain = copy.deepcopy(model)
    program = begin(model, Mode.TRAINING, {"main": Call((torch.ones(4, 8),))})
    program = PrecisionPolicy().apply(program, MASTERS)
    fast = ship(Compile().apply(program, Step("compile", {"mode": "default"})), model)
    x = torch.randn(4, 8)
    for _ in range(3):
        fast.zero_grad()
        fast(x).square().sum().backward()
        plain.zero_grad()
        plain(x).square().sum().backward()
        for p, q in zip(fast.parameters(), plain.parameters(), strict=True):
            assert p.grad.dtype is torch.float32
            assert (p.grad - q.grad).norm() <= 0.05 * q.grad.norm()
        with torch.no_grad():
            for p, q in zip(fast.parameters(), plain.parameters(), strict=True):
                p.mul_(0.9)
                q.mul_(0.9)
    assert not [note for note in program.notes if "graph break" in note or "recompile" in note]


def test_two_forwards_before_the_backward_and_masters_that_were_replaced() -> None:
    model, optimizer = shipped(MASTERS)
    both = loss(model, IDS) + loss(model, IDS)
    both.backward()
    plain = net()
    (loss(plain, IDS) + loss(plain, IDS)).backward()
    apart = (model.hidden.weight.grad - plain.hidden.weight.grad).norm() / plain.hidden.weight.grad.norm()
    assert apart < 0.05
    stale = loss(model, IDS)
    optimizer.step()
    loss(model, IDS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()
    model.hidden.weight = nn.Parameter(torch.ones(8, 8))
    with pytest.raises(RuntimeError, match="parameters were replaced"):
        model(IDS)


def test_masters_written_without_a_version_are_seen() -> None:
    model, _ = shipped(MASTERS)
    before = model(IDS)["logits"]
    model.hidden.weight.data.mul_(2)
    assert not torch.equal(model(IDS)["logits"], before)
