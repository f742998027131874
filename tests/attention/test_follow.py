"""Attention that a model writes out is recognised by what it does, and only then."""

import math

import pytest
import torch
from torch.nn import functional

from kernel_pytorch.attention.follow import AttentionFollower


def masked_fill(q, k, v):
    past = torch.ones(6, 6, dtype=torch.bool).tril()
    return ((q @ k.transpose(-2, -1)) / math.sqrt(8)).masked_fill(~past, float("-inf")).softmax(-1) @ v


def added(q, k, v):
    mask = torch.full((6, 6), float("-inf")).triu(1)
    return torch.softmax(torch.matmul(q, k.mT) * 8**-0.5 + mask, dim=-1).to(v.dtype) @ v


def compared(q, k, v):
    rows = torch.arange(6)
    past = rows[None, :] <= rows[:, None]
    return functional.softmax((q @ k.transpose(2, 3) * 0.25).masked_fill(past.logical_not(), -1e38), -1) @ v


def full(q, k, v):
    return functional.dropout((q @ k.transpose(-1, -2) / 3.0).to(q.dtype).softmax(dim=-1), 0.5, training=False) @ v


def called(q, k, v):
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def called_with_mask(q, k, v):
    return functional.scaled_dot_product_attention(q, k, v, torch.ones(6, 6, dtype=torch.bool).tril(), scale=0.5)


def run(attention, requires=True):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 6, 8, dtype=torch.float64, requires_grad=requires) for _ in range(3))
    seen = []

    def attend(query, key, value, causal, scale):
        seen.append((causal, round(scale, 6)))
        return functional.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)

    mode = AttentionFollower(attend)
    with mode:
        got = attention(q, k, v)
    return mode, seen, got, attention(q, k, v)


@pytest.mark.parametrize(
    ("attention", "causal", "scale"),
    [
        (masked_fill, True, 0.353553), (added, True, 0.353553), (compared, True, 0.25), (full, False, 0.333333),
        (called, True, 0.353553), (called_with_mask, True, 0.5),
    ],
)  # fmt: skip
def test_attention_is_recognised_with_its_mask_and_scale(attention, causal, scale):
    mode, seen, got, want = run(attention)
    assert seen == [(causal, scale)]
    assert mode.replaced == 1
    torch.testing.assert_close(got, want)


def window(q, k, v):
    near = torch.ones(6, 6, dtype=torch.bool).tril() & torch.ones(6, 6, dtype=torch.bool).triu(-2)
    return (q @ k.mT).masked_fill(~near, float("-inf")).softmax(-1) @ v


def unknown_mask(q, k, v):
    return (q @ k.mT + torch.where(torch.randn(6, 6) > 9, -math.inf, 0.0).to(q.dtype)).softmax(-1) @ v


def wrong_axis(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


def squared(q, k, v):
    return (q @ k.mT).square().softmax(-1) @ v


def dropped(q, k, v):
    torch.manual_seed(3)
    return functional.dropout((q @ k.mT).softmax(-1), 0.5, training=True) @ v


def scaled_after_mask(q, k, v):
    past = torch.ones(6, 6, dtype=torch.bool).tril()
    return ((q @ k.mT).masked_fill(~past, -1e38) * 0.0).softmax(-1) @ v


@pytest.mark.parametrize("attention", [window, unknown_mask, wrong_axis, squared, dropped, scaled_after_mask])
def test_what_is_not_plain_attention_runs_as_written(attention):
    torch.manual_seed(1)
    mode, seen, got, want = run(attention)
    assert seen == []
    assert mode.replaced == 0
    torch.testing.assert_close(got, want)
