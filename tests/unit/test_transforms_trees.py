"""Casting nested values keeps every container's type."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kernel_pytorch.transforms.trees import map_tensors

Pair = namedtuple("Pair", ["a", "b"])


@dataclass(frozen=True)
class Frozen:
    value: torch.Tensor
    name: str


class Cache:
    def __init__(self) -> None:
        self.keys = torch.ones(2)


CACHE = Cache()


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2),
        (torch.ones(2), 3, None),
        [torch.ones(2), "text"],
        {"x": torch.ones(2), "y": {"z": (torch.ones(1),)}},
        OrderedDict(x=torch.ones(2)),
        Pair(torch.ones(2), 1),
        Frozen(torch.ones(2), "name"),
        torch.Size([2, 3]),
        "text",
        CACHE,
    ],
    ids=lambda v: type(v).__name__,
)
def test_containers_keep_their_type(value: Any) -> None:
    got = map_tensors(value, lambda t: t + 1)
    assert type(got) is type(value)


def test_tensors_inside_are_changed_and_the_given_value_is_not() -> None:
    value = {"a": (torch.ones(2), [torch.ones(1)]), "b": Frozen(torch.ones(3), "n")}
    got = map_tensors(value, lambda t: t * 2)
    assert got["a"][0].tolist() == [2, 2]
    assert got["a"][1][0].tolist() == [2]
    assert got["b"].value.tolist() == [2, 2, 2]
    assert got["b"].name == "n"
    assert value["a"][0].tolist() == [1, 1]
    assert value["b"].value.tolist() == [1, 1, 1]


def test_an_object_of_another_kind_passes_through() -> None:
    assert map_tensors(CACHE, lambda t: t * 0) is CACHE


def test_hugging_face_outputs_keep_their_class_and_attributes() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    got = map_tensors(outputs.BaseModelOutput(last_hidden_state=torch.ones(2)), lambda t: t.double())
    assert type(got) is outputs.BaseModelOutput
    assert got.last_hidden_state.dtype is torch.float64
    assert got[0].dtype is torch.float64
