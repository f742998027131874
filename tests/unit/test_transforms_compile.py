"""Compiled calls: what is reported, what is frozen, and what a shape outside the workload does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor

from kernel_pytorch.catalog import apply_candidate
from kernel_pytorch.core.program import begin, call_counts, clone_model, ship
from kernel_pytorch.core.types import Candidate, Mode, Step
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.compile import entry_point, frozen
from kernel_pytorch.transforms.graph_report import Watched
from kernel_pytorch.transforms.scoped import Scoped
from kernel_pytorch.transforms.threads import threads

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning")


class Breaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        print(end="")  # a graph break, and the line the report must name
        return torch.relu(y)


def watched(model: nn.Module, notes: list[str]) -> Watched:
    call = torch.compile(entry_point(model._call_impl), backend="eager", dynamic=False)
    return Watched(call, notes, model)


def test_graph_breaks_are_told_by_the_users_line() -> None:
    notes: list[str] = []
    call = watched(Breaking().eval(), notes)
    with torch.no_grad():
        call(torch.ones(2, 4))
        line = next(i for i, t in enumerate(Path(__file__).read_text().splitlines(), 1) if "the line the report" in t)
        assert any(note.startswith(f"graph break at {__file__}:{line}: ") for note in notes), notes
        before = list(notes)
        call(torch.ones(2, 4))
    assert notes == before


def test_recompilations_and_their_limit_are_told() -> None:
    notes: list[str] = []
    call = watched(nn.Sequential(nn.Linear(4, 4)).eval(), notes)
    with torch.no_grad():
        for batch in range(1, 12):
            call(torch.ones(batch, 4))
    assert any(note.startswith("recompiled") and "size mismatch" in note for note in notes), notes
    assert any(note.startswith("recompile limit hit at") for note in notes), notes


def test_candidates_of_one_process_do_not_use_up_each_others_limit() -> None:
    model = nn.Linear(4, 4).eval()
    for batch in range(1, 12):
        notes: list[str] = []
        with torch.no_grad():
            watched(model, notes)(torch.ones(batch, 4))
        assert notes == []


def test_settings_stay_outside_what_is_compiled() -> None:
    model = nn.Linear(4, 4).eval()
    program = begin(model, Mode.INFERENCE, {"main": Call((torch.ones(1, 4),))})
    program.call = Scoped(program.call, threads(1))
    apply_candidate(program, Candidate((Step("compile", {"mode": "default"}),)))
    assert isinstance(program.call, Scoped)
    assert isinstance(program.call.inner, Watched)


def test_more_shapes_than_dynamo_specialises_on_are_refused() -> None:
    calls = {str(n): Call((torch.ones(n, 4),)) for n in range(1, 10)}
    program = begin(nn.Linear(4, 4).eval(), Mode.INFERENCE, calls)
    with pytest.raises(CandidateError, match="use dynamic=True"):
        apply_candidate(program, Candidate((Step("compile", {"mode": "default"}),)))


def test_freezing_holds_while_a_shape_compiles_and_at_no_other_time() -> None:
    seen: list[bool] = []

    def inner(x: torch.Tensor) -> torch.Tensor:
        seen.append(inductor.freezing)
        return x

    call = frozen(torch._dynamo.disable(inner), dynamic=False)
    call(torch.ones(2))
    call(torch.ones(2))
    call(torch.ones(3))
    assert seen == [True, False, True]
    assert inductor.freezing is False


@pytest.mark.slow
def test_a_frozen_model_follows_its_weights_and_keeps_other_shapes_right() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    model, x = clone_model(original), torch.randn(4, 8)
    step = Step("compile", {"mode": "default", "freezing": True})
    program = apply_candidate(begin(model, Mode.INFERENCE, {"main": Call((x,))}), Candidate((step,)))
    shipped = ship(program, original)
    with torch.no_grad():
        assert torch.allclose(shipped(x), original(x), atol=1e-6)
        other = torch.randn(5, 8)
        assert torch.equal(shipped(other), original(other))
        assert call_counts(shipped).outside == 1
        shipped[0].weight.mul_(2.0)
        assert torch.allclose(shipped(x), shipped._call_impl(x), atol=1e-6)
        assert not torch.allclose(shipped(x), original(x), atol=1e-3)
    assert "weights changed after freezing: compiled again" in program.notes
