"""Comparisons read back from the JSON that `--format json` and `--kpt-report FILE.json` write."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_pytorch.errors import KptError
from kernel_pytorch.guard.types import Comparison

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = ["ResultsError", "as_comparison", "load_json", "read_comparisons"]

SCHEMA_VERSION = 1
_MOST_BYTES = 256 * 2**20
_BOUNDS = {"value": math.nan, "low": 0.0, "high": math.inf}
"""What a bound that JSON could not write was."""


class ResultsError(KptError):
    """A file of results cannot be used; the message says why."""


def load_json(path: Path | str) -> Any:
    """Return what a JSON file holds.

    Raises:
        ResultsError: No such file, too large, no text, no JSON.
    """
    file = Path(path)
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ResultsError(f"{file} has {file.stat().st_size / 2**20:.0f} MiB, more than any file of results")
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ResultsError(f"no file {file}") from error
    except OSError as error:
        raise ResultsError(f"{file} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ResultsError(f"{file} is not JSON: {error}") from error


def read_comparisons(path: Path | str) -> tuple[Comparison, ...]:
    """Return the comparisons of a file: one, or those of a test run.

    Raises:
        ResultsError: It holds none; the message says what is wrong.
    """
    data = load_json(path)
    many = data.get("comparisons") if isinstance(data, dict) else data
    if many is None:
        return (as_comparison(data, str(path)),)
    if not isinstance(many, list):
        raise ResultsError(f"{path}: expected a comparison, or an array of them")
    return tuple(as_comparison(one, f"{path}: comparison {i}") for i, one in enumerate(many))


def as_comparison(data: Any, what: str = "the comparison") -> Comparison:
    """Return a comparison from what `report.comparison.as_json` made of it.

    Args:
        data: JSON values. What was not finite comes back as the bound or the NaN that it was.
        what: What it is called in messages.

    Raises:
        ResultsError: Of a newer version, or something is missing or of another type.
    """
    from pydantic import ValidationError

    if not isinstance(data, dict) or not isinstance(data.get("schema_version"), int):
        raise ResultsError(f"{what} is no comparison: it has no schema_version")
    if data["schema_version"] > SCHEMA_VERSION:
        raise ResultsError(
            f"{what} has schema version {data['schema_version']}, this kernel_pytorch reads up to {SCHEMA_VERSION}",
            fix="pip install --upgrade kernel-pytorch",
        )
    raw = {k: v for k, v in data.items() if k != "schema_version"}
    if isinstance(raw.get("change"), dict):
        raw["change"] = {k: _BOUNDS.get(k) if v is None else v for k, v in raw["change"].items()}
    for samples in ("base_samples_ms", "head_samples_ms"):
        if isinstance(raw.get(samples), list):
            raw[samples] = [math.nan if v is None else v for v in raw[samples]]
    for side in ("base", "head"):
        if isinstance(raw.get(side), dict):
            raw[side] = {k: _known(v) if k in ("telemetry", "kernels_ms") else v for k, v in raw[side].items()}
    if isinstance(raw.get("culprits"), list):
        raw["culprits"] = [
            {k: _known(v) if k == "evidence" else v for k, v in c.items()} if isinstance(c, dict) else c
            for c in raw["culprits"]
        ]
    try:
        return _adapter().validate_python(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(p) for p in first["loc"])
        raise ResultsError(f"{what} is corrupted at {where}: {first['msg']}") from error


def _known(values: Any) -> Any:
    """Return a mapping without what was not finite."""
    return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


@cache
def _adapter() -> TypeAdapter[Comparison]:
    from pydantic import TypeAdapter

    return TypeAdapter(Comparison)
