"""Scans that are written out while a step is traced compute what a loop computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernel_pytorch.backends.tpu import recurrent


def combine(left: Any, right: Any) -> Any:
    """One step of `x = a * x + b`, as state space models scan it."""
    return {"a": left["a"] * right["a"], "b": right["a"] * left["b"] + right["b"]}


def refused(*given: Any, **options: Any) -> Any:
    raise AssertionError((given, options))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_a_traced_scan_is_the_recurrence(length: int, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent, "detect_fake_mode", lambda _: object())
    generator = torch.Generator().manual_seed(length)
    xs = {name: torch.randn(3, length, 2, generator=generator, dtype=torch.float64) for name in "ab"}
    found = recurrent._traced_by(refused)(combine, xs, -2, reverse=reverse, combine_mode="generic")
    state, states = torch.zeros(3, 2, dtype=torch.float64), {}
    for i in reversed(range(length)) if reverse else range(length):
        state = xs["a"][:, i] * state + xs["b"][:, i]
        states[i] = state
    torch.testing.assert_close(found["b"], torch.stack([states[i] for i in range(length)], 1))


def test_a_scan_of_values_is_torch_tpus_own() -> None:
    given = {"a": torch.ones(2), "b": torch.ones(2)}
    assert recurrent._traced_by(lambda *_, **__: "its own")(combine, given, 0) == "its own"
