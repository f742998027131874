"""Series of times that were taken elsewhere: JSON arrays of milliseconds in time order."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernel_pytorch.errors import KptError

__all__ = ["FEWEST", "SeriesError", "check_series", "read_series"]

FEWEST = 10
"""Samples of each side below which nothing can be judged; `validation.regression` needs as many pairs."""
_FORM = "a JSON array of milliseconds in time order, such as [12.1, 12.3, 12.2]"


class SeriesError(KptError):
    """A file is no series of times, or the series is too short."""


def read_series(path: str | Path) -> tuple[float, ...]:
    """Return the samples of a file, in milliseconds, in time order.

    Raises:
        SeriesError: Not there, not JSON, not an array of positive numbers; the message names the first that is wrong.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SeriesError(f"no file {file}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SeriesError(f"{file} cannot be read: {error}", fix=f"it should hold {_FORM}") from error
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise SeriesError(f"{file} is not JSON: {error}", fix=f"it should hold {_FORM}") from error
    return check_series(value, str(file))


def check_series(value: Any, what: str) -> tuple[float, ...]:
    """Return samples as floats.

    Args:
        value: What should be a sequence of positive numbers.
        what: Its name, for the message.

    Raises:
        SeriesError: It is not.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise SeriesError(f"{what} holds {_kind(value)}, expected an array", fix=f"it should hold {_FORM}")
    for i, sample in enumerate(value):
        good = isinstance(sample, int | float) and not isinstance(sample, bool) and 0.0 < sample < math.inf
        if not good:
            shown = repr(sample) if not isinstance(sample, list | dict) else _kind(sample)
            raise SeriesError(f"sample {i} of {what} is {shown}, expected a positive number", fix=f"give {_FORM}")
    if len(value) < FEWEST:
        raise SeriesError(
            f"{what} has {len(value)} samples, too few to judge", fix=f"take at least {FEWEST}, better 40 a side"
        )
    return tuple(map(float, value))


def _kind(value: Any) -> str:
    named = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return named.get(type(value), "a number")
