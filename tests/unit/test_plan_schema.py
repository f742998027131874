"""A plan is data: strict JSON that round-trips, whatever its numbers, and corruption is told in one line."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
from plans import BF16, device, plan, trial

from kernel_pytorch.core.types import Plan, Step
from kernel_pytorch.errors import PlanError
from kernel_pytorch.plan.schema import dumps, json_schema, loads, trial_dumps, trial_loads

DOCS = Path(__file__).parents[2] / "docs"


def same(one, two) -> bool:
    return repr(one) == repr(two)  # NaN is not equal to itself


def test_a_plan_round_trips():
    original = plan()
    assert same(loads(dumps(original)), original)
    assert isinstance(loads(dumps(original)), Plan)


def test_a_plan_is_strict_json_with_nan_and_infinities():
    text = dumps(plan())

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    raw = json.loads(text, parse_constant=refuse)
    assert raw["prediction"]["ceilings"]["compile"] == "Infinity"
    checks = loads(text).evidence[1].numerics.checks
    assert checks[0].error == math.inf
    assert math.isnan(checks[1].error)


@pytest.mark.parametrize("value", [True, False, 0, 1, 1.0, -0.5, "1", "", "nan", math.inf, -math.inf])
def test_parameters_of_a_step_keep_their_types(value):
    step = Step("x", {"value": value})
    back = loads(dumps(plan(step))).candidate.steps[0].params["value"]
    assert back == value
    assert type(back) is type(value)


def test_texts_that_spell_numbers_stay_texts():
    back = trial_loads(trial_dumps(trial(BF16, reason="NaN", notes=("Infinity",))))
    assert back.reason == "NaN"
    assert back.notes == ("Infinity",)


def test_equal_plans_give_equal_text():
    assert dumps(plan()) == dumps(plan())
    assert dumps(plan()) != dumps(replace(plan(), created="2027-01-01T00:00:00+00:00"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ("null", "expected an object"),
        ("{}", "schema_version is None"),
        ('{"schema_version": "1"}', "schema_version is '1'"),
        ('{"schema_version": true}', "schema_version is True"),
        ('{"schema_version": 0}', "schema_version is 0"),
        ('{"schema_version": 2}', "reads up to 1"),
        ('{"schema_version": 1}', "corrupted at device"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_what_is_not_a_plan_is_told_in_one_line(text, says):
    with pytest.raises(PlanError, match=says) as caught:
        loads(text, what="out/plan.json")
    assert str(caught.value).startswith("out/plan.json")
    assert "\n" not in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize("name", [f.name for f in fields(Plan) if f.name not in ("command", "search_seconds")])
def test_each_field_is_checked(name):
    raw = json.loads(dumps(plan()))
    raw[name] = {"schema_version": 99, "created": 7}.get(name, "nonsense" if name != "package_version" else 1)
    with pytest.raises(PlanError):
        loads(json.dumps(raw))


def test_every_truncation_is_refused():
    text = dumps(plan()).rstrip()
    for end in range(0, len(text), 97):
        with pytest.raises(PlanError):
            loads(text[:end])


def test_the_published_schema_is_this_one():
    published = json.loads((DOCS / "plan.schema.json").read_text())
    assert published == json_schema(), "write json_schema() to docs/plan.schema.json"


def test_the_published_schema_accepts_a_plan_and_refuses_others():
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    raw = json.loads(dumps(plan()))
    assert list(validator.iter_errors(raw)) == []
    assert list(validator.iter_errors({**raw, "device": 1}))


def test_unknown_device_fields_of_a_later_writer_are_ignored():
    raw = json.loads(dumps(plan()))
    raw["device"]["later"] = 1
    assert loads(json.dumps(raw)).device == device()
