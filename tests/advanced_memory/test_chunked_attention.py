"""Attention by chunks of queries is attention."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kernel_pytorch.advanced_memory.chunked_attention import chunked_attention


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [1, 10, 12, 100])
def test_result_and_gradients_are_those_of_attention(causal, rows):
    torch.manual_seed(0)
    made = [torch.randn(2, 3, 37, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(2, 3, 37, 8, dtype=torch.float64)
    got = chunked_attention(*made, causal=causal, scale=0.3, rows=rows)
    want = scaled_dot_product_attention(*made, is_causal=causal, scale=0.3)
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad((x * weight).sum(), made) for x in (got, want)]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_more_keys_than_queries_and_another_width_of_values():
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 7, 8, requires_grad=True), torch.randn(1, 2, 19, 8, requires_grad=True)
    value = torch.randn(1, 2, 19, 5, requires_grad=True)
    got = chunked_attention(query, key, value, causal=False, scale=0.5, rows=3)
    want = scaled_dot_product_attention(query, key, value, scale=0.5)
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(x.square().sum(), (query, key, value)) for x in (got, want)]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_as_near_as_plain_attention():
    torch.manual_seed(0)
    made = [torch.randn(2, 2, 64, 16, dtype=torch.bfloat16) for _ in range(3)]
    wide = scaled_dot_product_attention(*(t.double() for t in made), is_causal=True)
    ours = chunked_attention(*made, causal=True, scale=0.25, rows=16)
    plain = scaled_dot_product_attention(*made, is_causal=True)
    assert (ours.double() - wide).norm() <= 2 * (plain.double() - wide).norm()
