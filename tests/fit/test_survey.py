"""How a survey adds attention: as it is, else without the masks that transformers makes while it is traced."""

from __future__ import annotations

import pytest

from kernel_pytorch.core.types import Mode, Skipped, Step
from kernel_pytorch.fit.survey import _add_attention

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
