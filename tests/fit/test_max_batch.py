"""The search for the largest batch: exact, and with few answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kernel_pytorch import Workload
from kernel_pytorch.core.types import Mode
from kernel_pytorch.errors import KptError
from kernel_pytorch.fit.build import Build
from kernel_pytorch.fit.max_batch import largest_batch
from kernel_pytorch.fit.outcome import Fit, How

BUILD = Build(Workload(model=nn.Identity, inputs=lambda: None), Mode.TRAINING)


def device(fixed: int, each: int, capacity: int, begin: int = 8) -> tuple[Callable[[Build], Fit], list[int]]:
    asked: list[int] = []

    def ask(build: Build) -> Fit:
        batch = build.batch or begin
        asked.append(batch)
        peak = fixed + each * batch
        fits = peak <= capacity
        return Fit(
            name="",
            device="tpu",
            place="v5e:1",
            how=How.COMPILED,
            mode=Mode.TRAINING,
            batch=batch,
            fits=fits,
            message="" if fits else "Ran out of memory",
            peak_bytes=peak if fits else 0,
            capacity_bytes=capacity,
        )

    return ask, asked


@given(st.integers(0, 500), st.integers(1, 40), st.integers(1, 200))
def test_the_largest_batch_is_found_exactly(fixed: int, each: int, most: int) -> None:
    ask, asked = device(fixed, each, fixed + each * most + each - 1)
    found = largest_batch(BUILD, ask)
    assert found.batch == most
    assert len(asked) <= 12
    assert len(asked) == len(set(asked))
    assert f"batch {most} fits and batch {most + 1} does not" in found.notes[-1]


def test_even_peaks_need_few_answers() -> None:
    ask, asked = device(1000, 10, 1000 + 10 * 777)
    assert largest_batch(BUILD, ask).batch == 777
    assert len(asked) <= 10


def test_nothing_that_fits_says_so_with_the_compilers_words() -> None:
    ask, _ = device(1000, 1, 900)
    with pytest.raises(KptError, match="not even a batch of 1 fits: Ran out of memory"):
        largest_batch(BUILD, ask)
