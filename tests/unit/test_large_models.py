"""Large models are judged in fp64 by a stand-in with fewer blocks, and beside the unmodified model at full size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from kernel_pytorch import KernelPyTorchConfig, Workload
from kernel_pytorch.backends import manager_for
from kernel_pytorch.core.program import ship, state_digest
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import Candidate, Mode, NumericsReport, Step
from kernel_pytorch.search.bench import build, prepare_bench
from kernel_pytorch.validation import numerics
from kernel_pytorch.validation.numerics import Subject, judge
from kernel_pytorch.validation.shorten import short_blocks, short_subject


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Deep(nn.Module):
    def __init__(self, blocks: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(16, 50)
        self.tall = False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Counting(Deep):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        assert len(self.blocks) == 6
        return super().forward(ids)


def make_ids(seed: int) -> torch.Tensor:
    return torch.randint(50, (4, 300), generator=torch.Generator().manual_seed(seed))


def loss(model: Callable[..., torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def subject(change: Callable[[Program], None], kind: type[nn.Module] = Deep, mode: Mode = Mode.TRAINING) -> Subject:
    workload = Workload(kind, make_ids, loss=loss if mode is Mode.TRAINING else None)
    config = KernelPyTorchConfig(mode=mode)
    bench = prepare_bench(workload, config, manager_for("cpu"), seed=0)

    def made(model, candidate, calls):
        program = build(bench, model, Candidate(), calls)
        if candidate.steps:
            change(program)
        return program

    from kernel_pytorch.core.program import clone_model

    candidate = Candidate((Step("change"),))
    program = made(clone_model(bench.model), candidate, bench.calls)
    ship(program, bench.model)
    return Subject(
        workload=workload, candidate=candidate, config=config, reference=bench.model, program=program, build=made,
        place=bench.manager.place, structural=lambda step: True,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch):
    monkeypatch.setattr(numerics, "is_large", lambda model: True)


def failed(report: NumericsReport) -> list[str]:
    return [c.name for c in report.checks if not c.passed]


def nothing(program: Program) -> None:
    return None


def test_fewer_blocks_and_smaller_inputs_stand_in_and_the_model_is_left_as_it_was():
    whole = subject(nothing)
    before = state_digest(whole.reference)
    short, told = short_subject(whole)
    assert len(short.reference.blocks) == 2
    assert short.workload.batch("main", 0).shape == (2, 128)
    assert "4 of the blocks" in told
    assert state_digest(whole.reference) == before
    assert len(whole.reference.blocks) == 6


def test_a_model_that_needs_its_blocks_keeps_them():
    short, told = short_subject(subject(nothing, Counting))
    assert len(short.reference.blocks) == 6
    assert "blocks" not in told


def test_blocks_come_back_where_the_body_raises():
    model = Deep()

    def body() -> None:
        with short_blocks(model):
            assert len(model.blocks) == 2
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        body()
    assert len(model.blocks) == 6


@pytest.mark.parametrize("mode", [Mode.TRAINING, Mode.INFERENCE])
def test_a_faithful_candidate_passes_and_says_what_stood_in(mode):
    report = judge(subject(nothing, mode=mode))
    assert not failed(report)
    assert any("stand-in" in text for text in report.unchecked)
    names = {c.name for c in report.checks}
    assert ("update at full size" in names) if mode is Mode.TRAINING else any(n.startswith("full size") for n in names)


def test_a_fault_that_shows_at_full_size_only_is_rejected():
    def wrong_when_long(program: Program) -> None:
        inner = program.call
        program.call = lambda ids: inner(ids) * (1.5 if ids.shape[1] > 200 else 1.0)

    assert not judge(subject(wrong_when_long)).passed
    report = judge(subject(wrong_when_long, mode=Mode.INFERENCE))
    assert any(n.startswith("full size") for n in failed(report))


class Dropping(Deep):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.drop(super().forward(ids))


def other_masks(program: Program) -> None:
    """Draw once more before each call, as compiled code draws by another generator."""
    inner = program.call

    def call(ids: torch.Tensor) -> torch.Tensor:
        torch.rand(1)
        return inner(ids)

    program.call = call


def test_other_masks_of_dropout_are_no_fault_at_full_size():
    report = judge(subject(other_masks, Dropping))
    assert not failed(report)
    assert any("random numbers" in text for text in report.unchecked)


def test_a_fault_at_full_size_shows_through_dropout():
    def wrong_when_long(program: Program) -> None:
        inner = program.call
        program.call = lambda ids: inner(ids) * (3.0 if ids.shape[1] > 200 else 1.0)

    assert not judge(subject(wrong_when_long, Dropping)).passed


def test_an_optimizer_that_is_wrong_on_the_whole_model_only_is_rejected():
    def frozen_tail(program: Program) -> None:
        optimizer = program.optimizer
        if len(program.model.blocks) > 2:
            optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][:-4]

    assert "update at full size" in failed(judge(subject(frozen_tail)))


def test_a_fault_in_every_block_is_seen_by_the_stand_in():
    def eps(program: Program) -> None:
        for block in program.model.blocks:
            block.norm.eps = 1e-2

    assert not judge(subject(eps)).passed
