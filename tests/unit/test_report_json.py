from __future__ import annotations

import json

import pytest
from plan_factory import make_bare_plan, make_crowded_plan, make_lost_plan, make_plan

from kernel_pytorch.report.json import explain


@pytest.mark.parametrize("plan", [make_plan(), make_lost_plan(), make_bare_plan(), make_crowded_plan()])
def test_every_plan_is_strict_json(plan):
    told = json.loads(json.dumps(explain(plan), allow_nan=False))
    assert len(told["trials"]) == len(plan.evidence)
    assert all({"candidate", "status", "reason", "speedup", "peak_bytes"} <= t.keys() for t in told["trials"])


def test_a_win():
    told = explain(make_plan())
    assert (told["speedup"], told["speedup_low"], told["speedup_high"]) == pytest.approx((2.84, 2.789, 2.894), abs=1e-3)
    assert told["chosen"] == [
        {"transform": "dtype", "params": {"dtype": "bfloat16"}},
        {"transform": "compile", "params": {"mode": "default"}},
    ]
    numerics = told["numerics"]
    assert numerics["passed"] is True
    assert numerics["max_rel_error"] == 1.1e-2
    assert numerics["budget"] == 2e-2
    assert numerics["worst"]["name"] == "output.last_hidden_state"
    assert told["device"]["arch"] == "x86_64-avx512_bf16"
    assert told["software"]["torch"] == "2.13.0+cpu"
    assert told["break_even_calls"] == make_plan().chosen.measurement.break_even_calls
    crashed = next(t for t in told["trials"] if t["status"] == "failed")
    assert crashed["speedup"] is None
    assert "signal 11" in crashed["reason"]
    assert told["untried"][0]["reason"] == "the budget of 240 s was spent"
    assert told["skipped"][1] == {
        "transform": "tf32",
        "reason": "only NVIDIA GPUs from Ampere on have TF32",
        "fix": "run on such a GPU",
    }


def test_the_unmodified_model_without_samples_is_one_by_definition():
    told = explain(make_bare_plan())
    assert (told["speedup"], told["chosen"]) == (1.0, [])
    assert told["numerics"]["passed"] is None
    assert told["break_even_calls"] is None


def test_an_error_that_is_not_a_number_is_null():
    told = explain(make_crowded_plan())
    wrong = next(t for t in told["trials"] if t["candidate"] == "dtype(dtype=float16)")
    assert wrong["max_rel_error"] is None
    assert "NaN" in wrong["reason"]
