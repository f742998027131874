"""A plan as JSON and back. The dataclasses of `core.types` are the schema; there is no second definition."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any

from kernel_pytorch.core.types import SCHEMA_VERSION, Plan, Trial
from kernel_pytorch.errors import PlanError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = ["dumps", "json_schema", "loads", "trial_dumps", "trial_loads"]

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_FREE_VALUES = frozenset({"params", "config"})
"""Fields whose values may be numbers or strings: there only the spelling tells `Infinity` from a text."""
_AGAIN = "run `kpt optimize` again"


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def plain(value: Any) -> Any:
    """Return dataclasses, tuples and enums as JSON values; NaN and infinities become strings."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        return _number(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def _revive(value: Any, *, free: bool = False) -> Any:
    if isinstance(value, dict):
        return {k: _revive(v, free=free or k in _FREE_VALUES) for k, v in value.items()}
    if isinstance(value, list):
        return [_revive(v, free=free) for v in value]
    if free and isinstance(value, str):
        return _NON_FINITE.get(value, value)
    return value


def _parse(text: str, kind: type, what: str) -> Any:
    from pydantic import ValidationError

    try:
        raw = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise PlanError(f"{what} is not valid JSON: {error}", fix=_AGAIN) from error
    if not isinstance(raw, dict):
        raise PlanError(f"{what} is a JSON {type(raw).__name__}, expected an object", fix=_AGAIN)
    if kind is Plan:
        _check_version(raw.get("schema_version"), what)
    try:
        return _adapter(kind).validate_python(_revive(raw))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(p) for p in first["loc"])
        raise PlanError(f"{what} is corrupted at {where}: {first['msg']}", fix=_AGAIN) from error


def _check_version(version: Any, what: str) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise PlanError(f"{what} is corrupted: schema_version is {version!r}", fix=_AGAIN)
    if version > SCHEMA_VERSION:
        raise PlanError(
            f"{what} has schema version {version}, this kernel_pytorch reads up to {SCHEMA_VERSION}",
            fix="pip install --upgrade kernel-pytorch",
        )


def dumps(plan: Plan) -> str:
    """Return a plan as indented JSON text: strict JSON, readable by people, equal plans give equal text."""
    return json.dumps(plain(plan), indent=1, allow_nan=False) + "\n"


def loads(text: str, *, what: str = "the plan") -> Plan:
    """Return the plan of a JSON text.

    Args:
        text: What `dumps` returned.
        what: The plan's name in errors, usually its path.

    Raises:
        PlanError: Not JSON, corrupted, or of a newer schema.
    """
    plan: Plan = _parse(text, Plan, what)
    return plan


def trial_dumps(trial: Trial) -> str:
    """Return a trial as one line of JSON."""
    return json.dumps(plain(trial), allow_nan=False)


def trial_loads(text: str, *, what: str = "the trial") -> Trial:
    """Return the trial of a line of JSON.

    Raises:
        PlanError: Not a trial.
    """
    trial: Trial = _parse(text, Trial, what)
    return trial


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of `plan.json`; numbers may be the strings `NaN`, `Infinity` and `-Infinity`."""
    schema: dict[str, Any] = _adapter(Plan).json_schema()
    number = {"anyOf": [{"type": "number"}, {"enum": sorted(_NON_FINITE)}]}

    def widen(node: Any) -> Any:
        if isinstance(node, list):
            return [widen(n) for n in node]
        if not isinstance(node, dict):
            return node
        if node.get("type") == "number":
            return {**{k: v for k, v in node.items() if k != "type"}, **number}
        return {k: widen(v) for k, v in node.items()}

    widened: dict[str, Any] = widen(schema)
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, "title": "kernel_pytorch plan", **widened}
