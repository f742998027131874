"""Padding to buckets: the same outputs at every size, few sizes inside, and models where it would be wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.core.program import begin, call_counts, plain_call, ship
from kernel_pytorch.core.types import DeviceSpec, Mode, Skip, Step, TensorSignature, WorkloadSpec
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.bucketing import Bucketing, pad_to, round_up

BATCH = Step("bucketing", {"dims": "batch"})
BOTH = Step("bucketing", {"dims": "batch_sequence"})
CPU = DeviceSpec("cpu", "", "x86_64", 1, 1, (), {}, 1.0, {})


class Encoder(nn.Module):
    def __init__(self, *, leak: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.leak = leak
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, scale: torch.Tensor) -> dict[str, Any]:
        self.sizes.append(tuple(input_ids.shape))
        x = self.embed(input_ids) * scale
        y = self.layer(x, src_key_padding_mask=None if self.leak == "mask" else attention_mask == 0)
        weights = attention_mask[..., None].to(y)
        pooled = y.mean(1) if self.leak == "mean" else (y * weights).sum(1) / weights.sum(1)
        if self.leak == "batch":
            pooled = pooled - pooled.mean(0)
        return {"hidden": y, "pooled": pooled}


def batch(rows: int, length: int, seed: int = 0) -> Call:
    g = torch.Generator().manual_seed(seed)
    mask = (torch.arange(length)[None] < torch.randint(1, length + 1, (rows, 1), generator=g)).long()
    mask[0] = 1
    ids = torch.randint(1, 20, (rows, length), generator=g)
    return Call((), {"input_ids": ids, "attention_mask": mask, "scale": torch.full((16,), 2.0)})


@pytest.fixture(autouse=True)
def _slow_path() -> Iterator[None]:
    """The slow path of nn.TransformerEncoderLayer: the fast one drops masked tokens from the output."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def apply(model: nn.Module, step: Step, **calls: Call) -> Any:
    program = begin(model.eval(), Mode.INFERENCE, calls)
    program.dynamic = False
    return Bucketing().apply(program, step)


@torch.no_grad()
def test_every_size_gives_the_unpadded_outputs_from_a_few_sizes() -> None:
    model, original = Encoder().eval(), Encoder().eval()
    program = apply(model, BOTH, main=batch(5, 7))
    shipped = ship(program, original)
    model.sizes.clear()
    for rows, length in ((1, 3), (3, 4), (4, 4), (5, 9), (6, 16), (8, 12)):
        call = batch(rows, length, seed=rows)
        got, want = shipped(**call.kwargs), original(**call.kwargs)
        for name in want:
            assert got[name].shape == want[name].shape
            assert torch.allclose(got[name], want[name], atol=1e-5), name
    assert set(model.sizes) == {(1, 4), (4, 4), (8, 16)}
    assert call_counts(shipped).outside == 0
    assert program.dynamic
    assert program.notes == ["inputs are padded to powers of two: bs bs ."]


@torch.no_grad()
def test_given_buckets_serve_what_fits_and_powers_of_two_the_rest() -> None:
    model = nn.Linear(3, 2)
    seen: list[int] = []
    model.register_forward_hook(lambda m, a, out: seen.append(len(out)))
    program = apply(model, Step("bucketing", {"dims": "batch", "buckets": "12, 6"}), main=Call((torch.ones(2, 3),)))
    seen.clear()
    for rows in (1, 6, 7, 13):
        x = torch.randn(rows, 3)
        assert torch.allclose(program.call(x), nn.functional.linear(x, model.weight, model.bias), atol=1e-6)
    assert seen == [6, 6, 12, 16]
    assert round_up(1, []) == 1
    assert round_up(5, []) == 8


@pytest.mark.parametrize(
    ("leak", "step", "words"),
    [
        ("batch", BATCH, "depends on what padded rows hold"),
        ("mask", BOTH, "depends on what padded tokens hold"),
        ("mean", BOTH, "depends on what padded tokens hold"),
    ],
)
@pytest.mark.parametrize("rows", [1, 4])
def test_models_that_see_the_padding_are_refused(leak: str, step: Step, words: str, rows: int) -> None:
    with pytest.raises(CandidateError, match=words):
        apply(Encoder(leak=leak), step, main=batch(rows, 6))
    apply(Encoder(), step, main=batch(rows, 6))


def test_other_effects_of_padding_are_refused() -> None:
    x = Call((torch.randn(4, 3),))

    class Counts(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x * len(x)

    class Sorted(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x.argsort(0).argsort(0)

    class Pairs(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x.repeat(2, 1)

    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x + torch.ones(4, 3)

    class Cached(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x, object()

    for model, words in (
        (Counts(), r"changes by .* when rows are padded"),
        (Sorted(), "rows"),
        (Pairs(), "padding changes output 0 from"),
        (Cached(), "returns a object, which cannot be cut back"),
        (Fixed(), "do not fit the model"),
        (nn.BatchNorm1d(3), ""),
    ):
        if words:
            with pytest.raises(CandidateError, match=words):
                apply(model, BATCH, main=x)
        else:
            apply(model, BATCH, main=x)


def test_inputs_without_the_dimensions_are_told() -> None:
    model = nn.Linear(3, 2)
    x = Call((torch.ones(4, 3),))
    for step, calls, words in (
        (BATCH, {}, "checked on example inputs"),
        (BATCH, {"main": Call((torch.tensor(1.0),))}, "no batch dimension"),
        (BOTH, {"main": x}, "only with a two-dimensional attention_mask"),
        (Step("bucketing", {"dims": "rows"}), {"main": x}, "unknown dims 'rows'"),
        (Step("bucketing", {"buckets": "8,x"}), {"main": x}, "sizes separated by commas"),
    ):
        with pytest.raises(CandidateError, match=words):
            apply(model, step, **calls)
    program = apply(model, BATCH, main=x)
    with pytest.raises(ValueError, match="the call has 2 tensors"):
        program.call(torch.ones(4, 3), torch.ones(4, 3))
    two = apply(nn.Bilinear(3, 3, 2), BATCH, main=Call((torch.ones(4, 3), torch.ones(4, 3))))
    with pytest.raises(ValueError, match="disagree about the size of dimension 0"):
        two.call(torch.ones(4, 3), torch.ones(1, 3))


def test_it_is_proposed_for_several_shapes() -> None:
    one = {"main": (TensorSignature((4, 3), "float32"),)}
    spec = WorkloadSpec("m", "", Mode.INFERENCE, one, {}, 1, 4, 0, ("float32",), {}, {}, {})
    assert isinstance(Bucketing().propose(spec, CPU), Skip)
    spec = replace(spec, signatures={**one, "more": (TensorSignature((8, 3), "float32"),)})
    assert Bucketing().propose(spec, CPU) == [BATCH, BOTH]
    assert isinstance(Bucketing().propose(replace(spec, mode=Mode.TRAINING), CPU), Skip)


@torch.no_grad()
def test_ejected_source_pads() -> None:
    model = nn.Linear(3, 2)
    names: dict[str, Any] = {"model": model, "call": plain_call(model)}
    exec(Bucketing().source(BATCH), names)
    x = torch.randn(5, 3)
    assert torch.allclose(names["call"](x), model(x), atol=1e-6)
    assert pad_to(x, 0, 8, repeat=True).shape == (8, 3)
