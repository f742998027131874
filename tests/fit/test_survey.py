"""How a survey adds attention: as it is, else without the masks that transformers makes while it is traced."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from kernel_pytorch import Workload
from kernel_pytorch.core.types import Candidate, Mode, Skipped, Step
from kernel_pytorch.fit import survey
from kernel_pytorch.fit.build import Build
from kernel_pytorch.fit.survey import _add_attention, _add_splash


class Layer(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.linear(x))


@pytest.mark.parametrize(("dropout", "said"), [(0.0, ""), (0.5, "draws random numbers")])
def test_a_loop_is_an_option_where_the_blocks_are_one(
    monkeypatch: pytest.MonkeyPatch, dropout: float, said: str
) -> None:
    monkeypatch.setattr(survey, "trace_step", partial(survey.trace_step, device="cpu"))
    workload = Workload(
        model=lambda: nn.Sequential(*(Layer(dropout) for _ in range(4))),
        inputs=lambda: torch.zeros(2, 8),
        loss=lambda model, x: model(x).square().mean(),
    )
    reason = survey._no_loop(Build(workload, Mode.TRAINING), [], "Layer")
    assert said in reason
    assert bool(said) == bool(reason)


def test_a_set_and_its_loop_keep_the_same() -> None:
    params = {"block": "Layer", "keep": "product:0", "plain": 1}
    looped = survey._looped(Candidate((SPLASH, Step("recompute", params))))
    assert looped == Candidate((SPLASH, Step("scan_layers", params)))


SPLASH, MASK = Step("splash_attention"), Step("causal_mask")


@pytest.mark.parametrize(
    ("without_masks", "told"),
    [
        ("splash_attention: attention weights are dropped out", "splash_attention: attention weights are dropped out"),
        ("causal_mask: no mask is made in the model", "splash_attention: the mask is not the causal one"),
    ],
)
def test_what_is_in_the_way_once_masks_are_gone_is_the_reason(without_masks: str, told: str) -> None:
    left_out: list[Skipped] = []

    def add(*steps: Step) -> bool:
        reason = without_masks if len(steps) > 1 else "splash_attention: the mask is not the causal one"
        left_out.append(Skipped(steps[-1].transform, reason))
        return False

    _add_attention(SPLASH, add, Mode.TRAINING, left_out)
    assert [skipped.reason for skipped in left_out] == [told]


@pytest.mark.parametrize(
    ("mode", "applying", "asked", "reasons"),
    [
        (Mode.TRAINING, [(SPLASH,)], [(SPLASH,)], 0),
        (Mode.TRAINING, [(MASK, SPLASH)], [(SPLASH,), (MASK, SPLASH)], 0),
        (Mode.TRAINING, [], [(SPLASH,), (MASK, SPLASH)], 1),
        (Mode.INFERENCE, [(MASK, SPLASH)], [(SPLASH,)], 1),
    ],
)
def test_attention_is_added_with_its_masks_or_without_them(
    mode: Mode, applying: list[tuple[Step, ...]], asked: list[tuple[Step, ...]], reasons: int
) -> None:
    seen: list[tuple[Step, ...]] = []
    left_out: list[Skipped] = []

    def add(*steps: Step) -> bool:
        seen.append(steps)
        if steps not in applying:
            left_out.append(Skipped(steps[-1].transform, f"reason {len(seen)}"))
        return steps in applying

    _add_attention(SPLASH, add, mode, left_out)
    assert seen == asked
    assert [skipped.reason for skipped in left_out] == ["reason 1"][:reasons]


@pytest.mark.parametrize(
    ("reasons", "asked", "told"),
    [
        ({}, [{}], []),
        ({"": "splash_attention: shapes (1, 2) are not taken"}, [{}, {"pad": 128}], []),
        (
            {"": "splash_attention: rows of 100 are not taken", "pad": "splash_attention(pad=128): rows of 100"},
            [{}, {"pad": 128}],
            ["splash_attention: rows of 100 are not taken"],
        ),
        (
            {
                "": "splash_attention: drops out",
                "pad": "splash_attention(pad=128): multiples of 128 already",
            },
            [{}, {"pad": 128}],
            ["splash_attention: drops out"],
        ),
    ],
)
def test_heads_are_padded_where_the_kernels_refuse_them(
    reasons: dict[str, str], asked: list[dict[str, int]], told: list[str]
) -> None:
    seen: list[Step] = []
    left_out: list[Skipped] = []

    def add(*steps: Step) -> bool:
        if len(steps) > 1:
            left_out.append(Skipped("causal_mask", "causal_mask: no mask is made in the model"))
            return False
        seen.append(steps[0])
        reason = reasons.get("pad" if steps[0].params else "")
        if reason:
            left_out.append(Skipped("splash_attention", reason))
        return not reason

    _add_splash(add, Mode.TRAINING, left_out)
    assert [dict(s.params) for s in seen] == asked
    assert [s.reason for s in left_out] == told
