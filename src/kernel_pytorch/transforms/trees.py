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

    kind: Any = type(value)
    if isinstance(value, torch.Tensor):
        result: Any = fn(value)
    elif isinstance(value, dict):
        result = {key: map_tensors(item, fn) for key, item in value.items()}
        if hasattr(kind, "__dataclass_fields__"):
            result = kind(**result)
        elif kind is not dict:
            items, result = result, copy.copy(value)
            result.update(items)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        result = kind(*[map_tensors(item, fn) for item in value])
    elif kind in (tuple, list):
        result = kind([map_tensors(item, fn) for item in value])
    elif hasattr(kind, "__dataclass_fields__"):
        result = copy.copy(value)
        for field in dataclasses.fields(kind):
            object.__setattr__(result, field.name, map_tensors(getattr(value, field.name), fn))
    else:
        result = value
    return result
