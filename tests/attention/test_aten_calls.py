"""The operators of PyTorch that only a GPU runs: called on tensors without data, both directions, as tracing does."""

from __future__ import annotations

import pytest
import torch

from kernel_pytorch.attention import implementations

SQUARE = {"right": 0}
CACHE = {"right": 0, "alignment": "lower_right"}


@pytest.mark.parametrize(
    ("name", "heads", "kv_heads", "q_len", "kv_len", "size", "band"),
    [
        *((name, 8, 8, 64, 64, 80, SQUARE) for name in ("cudnn", "flash", "efficient")),
        *((name, 8, 8, 64, 40, 68, {}) for name in ("cudnn", "flash", "efficient")),
        *((name, 8, 2, 64, 64, 64, SQUARE) for name in ("cudnn", "flash", "efficient")),
        *((name, 8, 2, 64, 96, 64, CACHE) for name in ("flash", "efficient")),
        ("flash", 8, 2, 64, 96, 64, {**CACHE, "left": 10}),
        ("cudnn", 8, 8, 64, 90, 64, {"mask": True}),
        ("efficient", 8, 8, 64, 90, 64, {"mask": True}),
    ],
)
def test_shapes_of_results_and_gradients(name, heads, kv_heads, q_len, kv_len, size, band):
    options = {"left": None, "right": None, "alignment": "upper_left", **band}
    mask = torch.ones(q_len, kv_len, dtype=torch.bool, device="meta") if options.pop("mask", False) else None
    backward = not (name == "efficient" and options["alignment"] == "lower_right")
    make = {"device": "meta", "dtype": torch.bfloat16, "requires_grad": backward}
    q, k = torch.empty(2, heads, q_len, size, **make), torch.empty(2, kv_heads, kv_len, size, **make)
    v = torch.empty_like(k, requires_grad=backward)
    out = implementations()[name].call(q, k, v, attn_mask=mask, dropout_p=0.0, scale=None, softcap=0.0, **options)
    assert out.shape == q.shape
    if backward:
        gradients = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
        assert [g.shape for g in gradients] == [t.shape for t in (q, k, v)]


def test_packed_documents_of_flash():
    make = {"device": "meta", "dtype": torch.bfloat16, "requires_grad": True}
    q, k = torch.empty(300, 8, 68, **make), torch.empty(320, 8, 68, **make)
    offsets = torch.empty(4, dtype=torch.int32, device="meta")
    call = implementations()["flash"].call_varlen
    out = call(q, k, k, offsets, offsets, 100, 110, scale=None, left=None, right=0, softcap=0.0)
    assert out.shape == q.shape
    assert [g.shape for g in torch.autograd.grad(out, (q, k), torch.empty_like(out))] == [q.shape, k.shape]


def test_cudnns_backward_takes_a_foreign_forward():
    from kernel_pytorch.attention.flash_op import BACKWARD, Problem

    q = torch.empty(2, 64, 8, 64, device="meta", dtype=torch.bfloat16)
    lse = torch.empty(2, 8, 64, device="meta")
    gradients = BACKWARD["cudnn"](q, q, q, q, q, lse, Problem(None, None, 64, 64, 0.1, -1, 0, 0.0))
    assert [g.shape for g in gradients] == [q.shape] * 3
