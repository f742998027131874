from __future__ import annotations

import math
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch

from kernel_pytorch.validation.compare import Flat, compare_values, flatten, structure_checks, tensor_error

Pair = namedtuple("Pair", "a b")


@dataclass
class Out:
    logits: torch.Tensor
    extra: object = None


def findings(candidate, reference):
    return [c.name for c in structure_checks(flatten(candidate), flatten(reference)) if not c.passed]


X = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    "tree", [X, (X, X), [X], {"a": X, 1: (X, None)}, Pair(X, 2), Out(X, {"n": 3}), {"s": "text", "f": 0.5}, None]
)
def test_equal_trees_have_no_findings(tree):
    assert findings(tree, tree) == []


@pytest.mark.parametrize(
    ("candidate", "reference", "finding"),
    [
        ((X,), [X], "structure output"),
        ({"a": X}, {"b": X}, "structure output"),
        (Pair(X, X), (X, X), "structure output"),
        ({"logits": X, "extra": None}, Out(X), "structure output"),
        (X[:1], X, "shape output"),
        (X.half(), X, "dtype output"),
        (X.long(), X, "dtype output"),
        (X.clone().requires_grad_(), X, "requires_grad output"),
        (X * math.nan, X, "finite output"),
        (X / 0, X, "finite output"),
        ({"n": 3}, {"n": 4}, "value output.n"),
        ({"n": None}, {"n": X}, "structure output.n"),
    ],
)
def test_what_differs_is_named(candidate, reference, finding):
    assert findings(candidate, reference)[0] == finding


def test_tensors_inside_foreign_objects_are_compared_by_value_not_dtype():
    class Cache:
        def __init__(self, keys):
            self.keys = keys

    assert findings(Cache(X.half()), Cache(X)) == []
    errors = compare_values(flatten(Cache(X * 2)), flatten(Cache(X)))
    assert errors["output.keys"].row == pytest.approx(1.0)


def test_the_worst_row_counts_and_rows_near_zero_do_not():
    want = torch.ones(4, 100, dtype=torch.float64)
    want[3] = 1e-9
    got = want.clone()
    got[1, 0] += 0.5
    got[3] += 1e-3
    assert tensor_error(got, want).row == pytest.approx(0.5 / 10)
    assert tensor_error(got, want, samples=True).row == pytest.approx(0.5 / 10)


def test_a_sample_holds_all_rows_under_one_index():
    want = torch.ones(2, 4, 9)
    got = want.clone()
    got[0, 0] += 1.0
    assert tensor_error(got, want).row == pytest.approx(1.0)
    assert tensor_error(got, want, samples=True).row == pytest.approx(0.5)


def test_integers_give_the_share_that_differs_and_complex_numbers_their_distance():
    assert tensor_error(torch.tensor([1, 2, 3, 5]), torch.tensor([1, 2, 3, 4])).row == 0.25
    want = torch.tensor([3 + 4j, 0])
    assert tensor_error(want * 1j, want).row == pytest.approx(math.sqrt(2))
    assert tensor_error(want, want).cosine == pytest.approx(1.0)


def test_masks_must_agree_in_place_and_sign():
    want = torch.tensor([[0.5, -math.inf, torch.finfo(torch.float32).min]])
    same = torch.tensor([[0.5, -math.inf, torch.finfo(torch.bfloat16).min]])
    assert tensor_error(same, want).row == 0
    assert tensor_error(torch.tensor([[0.5, 0.0, -math.inf]]), want).row == math.inf
    assert tensor_error(torch.tensor([[0.5, math.inf, -math.inf]]), want).row == math.inf


def test_empty_and_zero_tensors():
    assert tensor_error(torch.zeros(0, 3), torch.zeros(0, 3)).row == 0
    assert tensor_error(torch.zeros(2, 3), torch.zeros(2, 3)).row == 0
    assert tensor_error(torch.full((2, 3), 1e-9), torch.zeros(2, 3)).row == math.inf


def test_a_flat_tree_comes_back_from_plain_values(tmp_path):
    flat = flatten({"a": (X, 2.5), "b": "text"})
    torch.save(flat.as_dict(), tmp_path / "flat.pt")
    back = Flat(**torch.load(tmp_path / "flat.pt", weights_only=True))
    assert [c.passed for c in structure_checks(back, flat)] == [True]
    assert all(e.row == 0 for e in compare_values(back, flat).values())


def test_rows_are_compared_in_pieces_with_the_same_result(monkeypatch):
    import kernel_pytorch.validation.compare as compare

    torch.manual_seed(0)
    want = torch.randn(50, 7)
    got = want + 0.01 * torch.randn(50, 7)
    whole = tensor_error(got, want)
    monkeypatch.setattr(compare, "_CHUNK_ELEMENTS", 20)
    assert tensor_error(got, want) == whole
