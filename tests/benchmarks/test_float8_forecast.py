"""Predictions beside measurements: what counts as right, and that cases are measured once."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from kernel_pytorch.precision.rates import RATES

from .loading import load

script = load("float8_forecast")


def layer(plain, small, suffix=""):
    return {"samples_ms": {f"bf16{suffix}": [plain, 9.0 * plain, plain], f"float8{suffix}": [small, small, 0.0]}}


def row(helps, speedup, **layers):
    return {"predicted": {"helps": helps, "speedup": speedup}, "layers": layers}


def test_a_case_is_measured_with_each_layer_as_it_is_faster() -> None:
    found = script.measured({"qkv": layer(2.0, 1.0), "out": layer(1.0, 3.0), "down": layer(1.0, 0.99)})
    assert found == pytest.approx({"helps": True, "speedup": 4.0 / 3.0, "bf16_ms": 4.0, "ms": 3.0})
    none = script.measured({"out": layer(1.0, 3.0)})
    assert (none["helps"], none["speedup"]) == (False, 1.0)
    assert script.measured({"out": layer(1.0, 3.0)}, " compiled") is None
    assert script.measured({"out": {"samples_ms": {}}, "qkv": layer(2.0, 1.0)}) is None
    assert script.measured({}) is None


@pytest.mark.parametrize(
    ("helps", "speedup", "small", "right", "within"),
    [
        (True, 2.15, 1.0, True, True),
        (True, 2.25, 1.0, True, False),
        (True, 1.75, 1.0, True, False),
        (False, 1.0, 1.9, False, False),  # within a tenth, and wrong
        (False, 1.0, 2.5, True, True),
        (True, 1.05, 2.5, False, False),
    ],
)
def test_a_prediction_is_right_where_the_answer_is_and_the_figure_near(helps, speedup, small, right, within) -> None:
    found = script.judged(row(helps, speedup, out=layer(2.0, small)))
    assert (found["right"], found["within"]) == (right, within)


def test_uncompiled_and_compiled_are_counted_apart() -> None:
    both = layer(2.0, 1.0)
    both["samples_ms"] |= layer(2.0, 3.0, " compiled")["samples_ms"]
    found = script.summarise(
        {"a": row(True, 2.0, out=both), "b": row(False, 1.0, out=layer(2.0, 1.0)), "c": row(True, 2.0)}
    )
    assert found["uncompiled"] == {"cases": 3, "measured": 2, "right": 1, "within": 1}
    assert found["compiled"] == {"cases": 3, "measured": 1, "right": 0, "within": 0}


def test_the_cases_are_small_and_large_and_foreseen_both_ways() -> None:
    assert len(script.CASES) >= 10
    assert {min(c.hidden for c in script.CASES), max(c.hidden for c in script.CASES)} == {512, 8192}
    assert {min(c.tokens for c in script.CASES), max(c.tokens for c in script.CASES)} == {2048, 32768}
    told = {case.name: script.predicted(case, "sm_90", "tensorwise_delayed") for case in script.CASES}
    assert {found["helps"] for found in told.values()} == {True, False}
    assert all(set(found["layers"]) == {"qkv", "out", "up", "down"} for found in told.values())
    case = next(case for case in script.CASES if case.name == "llama-70b 8192, 8k tokens")
    features = 8192 * (8192 + 2048) + 8192 * 8192 + 3 * 8192 * 28672
    plain = sum(part["bf16"] for part in told[case.name]["layers"].values())
    assert plain == pytest.approx(1e3 * 6 * 8192 * features / RATES["sm_90"].plain_flops)


def called(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["float8_forecast.py", "--smoke", *map(str, options)])
    script.main()


def test_a_case_is_measured_once(monkeypatch, tmp_path, capsys) -> None:
    path = tmp_path / "forecast.json"
    for name, least in (("ROUNDS", 2), ("BURST_MS", 0.01), ("WARM_SECONDS", 0.0)):
        monkeypatch.setattr(script, name, least)
    called(monkeypatch, "-o", path, "--deadline", 0)
    assert json.loads(path.read_text())["rows"] == {}
    called(monkeypatch, "-o", path, "--only", "tiny 32")
    first = json.loads(path.read_text())
    assert first["emulated"]
    (found,) = first["rows"].values()
    for part in found["layers"].values():
        assert {name: len(samples) for name, samples in part["samples_ms"].items()} == {"bf16": 2, "float8": 2}
        assert max(part["errors"].values()) <= script.EXACT
    monkeypatch.setattr(script, "layer_samples", lambda *args: pytest.fail("measured again"))
    called(monkeypatch, "-o", path, "--only", "tiny 32")
    assert json.loads(path.read_text())["rows"] == first["rows"]
    called(monkeypatch, "-o", path, "--only", "tiny 32", "--again-predict")
    (again,) = json.loads(path.read_text())["rows"].values()
    assert again["predicted"].pop("after_measuring")
    assert again == found
    assert "measured" in capsys.readouterr().out


def test_a_layer_that_is_wrong_has_no_times(monkeypatch) -> None:
    monkeypatch.setattr(script, "wrongness", lambda *args: {"y": 0.0, "dx": float("nan")})
    found = script.layer_samples(16, 16, 16, SimpleNamespace(recipe="tensorwise_current", compiled=False))
    assert found["samples_ms"] == {}
    assert script.measured({"out": found}) is None
