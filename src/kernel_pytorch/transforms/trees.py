"""Apply a function to every tensor of nested inputs or outputs, in code that Dynamo traces without a graph break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["map_tensors"]


def map_tensors(value: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return `value` with `fn` applied to the tensors in it; containers keep their type.

    Dicts (and Hugging Face outputs, which are dicts), tuples, named tuples, lists and dataclasses are walked; any other
    object, such as a key-value cache, is returned as it is, so that its state passes through unchanged.
    """
    import copy
    import dataclasses

    if isinstance(value, torch.Tensor):
        return fn(value)
    if isinstance(value, dict):
        items = {key: map_tensors(item, fn) for key, item in value.items()}
        if type(value) is dict:
            return items
        if dataclasses.is_dataclass(value):
            return type(value)(**items)
        same = copy.copy(value)
        same.update(items)
        return same
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[map_tensors(item, fn) for item in value])
    if type(value) in (tuple, list):
        return type(value)([map_tensors(item, fn) for item in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        same = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(same, field.name, map_tensors(getattr(value, field.name), fn))
        return same
    return value
