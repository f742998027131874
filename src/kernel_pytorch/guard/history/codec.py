"""A run as JSON and back. The dataclasses of `guard.types` are the schema; there is no second definition."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import TYPE_CHECKING, Any

from kernel_pytorch.guard.history.errors import RunError
from kernel_pytorch.guard.types import Comparison
from kernel_pytorch.plan.schema import plain

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = ["dumps", "from_plain", "loads", "to_plain"]

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@cache
def _adapter() -> TypeAdapter[Comparison]:
    from pydantic import TypeAdapter

    return TypeAdapter(Comparison)


def to_plain(run: Comparison) -> dict[str, Any]:
    """Return a run as JSON values; NaN and infinities become strings."""
    values: dict[str, Any] = plain(run)
    return values


def from_plain(values: Any, *, what: str = "the run") -> Comparison:
    """Return the run of JSON values; fields that a newer version added are left out.

    Raises:
        RunError: They are not a run.
    """
    from pydantic import ValidationError

    try:
        for culprit in values.get("culprits", ()):
            evidence = culprit.get("evidence", {})
            culprit["evidence"] = {k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in evidence.items()}
        return _adapter().validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise RunError(f"{what} is corrupted at {where}: {first['msg']}") from error
    except (AttributeError, TypeError) as error:
        raise RunError(f"{what} is corrupted: {error}") from error


def dumps(run: Comparison) -> str:
    """Return a run as one line of strict JSON in ASCII."""
    return json.dumps(to_plain(run), allow_nan=False)


def loads(text: str, *, what: str = "the run") -> Comparison:
    """Return the run of a JSON text.

    Raises:
        RunError: It is not a run.
    """
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RunError(f"{what} is not valid JSON: {error}") from error
    return from_plain(values, what=what)
