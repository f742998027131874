"""The definition against SDPA and against itself in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernel_pytorch.attention.reference import attend, attend_varlen, visible
from kernel_pytorch.attention.types import visible_band


def qkv(batch=2, heads=4, kv_heads=4, q_len=9, kv_len=9, size=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda h, t: torch.randn(batch, h, t, size, generator=generator, dtype=dtype)  # noqa: E731
    return draw(heads, q_len), draw(kv_heads, kv_len), draw(kv_heads, kv_len)


def sdpa(*args, **kwargs):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kv_len", [5, 9, 14])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_as_sdpa(kv_heads, kv_len, is_causal, scale):
    q, k, v = qkv(kv_heads=kv_heads, kv_len=kv_len)
    want = sdpa(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v, right=0 if is_causal else None, scale=scale), want)


@pytest.mark.parametrize("shape", [(9, 9), (1, 1, 9, 9), (2, 4, 9, 9), (1, 9)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_as_sdpa(shape, kind):
    q, k, v = qkv()
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 0] = True
    mask = mask if kind == "bool" else torch.where(mask, 0.5, -3.0).double()
    torch.testing.assert_close(attend(q, k, v, attn_mask=mask), sdpa(q, k, v, attn_mask=mask))


def test_bounds_are_the_keys_a_query_sees():
    kwargs = {"device": torch.device("cpu")}
    seen = visible(3, 5, left=1, right=0, alignment="lower_right", **kwargs)
    assert seen.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    seen = visible(3, 5, left=None, right=1, alignment="upper_left", **kwargs)
    assert seen.int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    seen = visible(3, 5, left=0, right=None, alignment="upper_left", **kwargs)
    assert seen.int().tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert visible(3, 5, left=None, right=None, alignment="upper_left", **kwargs) is None


@pytest.mark.parametrize("alignment", ["upper_left", "lower_right"])
@pytest.mark.parametrize("window", [None, (2, 1), (None, 3), (1, None), (0, 0), (20, 20)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 7), (5, 5), (5, 8), (8, 5)])
def test_reducing_a_band_changes_nothing(alignment, window, is_causal, lengths):
    q_len, kv_len = lengths
    left, right = window or (None, None)
    asked = torch.ones(q_len, kv_len, dtype=torch.bool)
    offset = kv_len - q_len if alignment == "lower_right" else 0
    for i in range(q_len):
        for j in range(kv_len):
            distance = j - i - offset
            hidden = (left is not None and distance < -left) or (right is not None and distance > right)
            asked[i, j] = not (hidden or (is_causal and distance > 0))
    band = visible_band(q_len, kv_len, is_causal=is_causal, window=window, alignment=alignment)
    reduced_left, reduced_right, keys, reduced_alignment = band
    device = torch.device("cpu")
    seen = visible(q_len, keys, left=reduced_left, right=reduced_right, alignment=reduced_alignment, device=device)
    got = torch.zeros_like(asked)
    got[:, :keys] = True if seen is None else seen
    assert torch.equal(got, asked)
    again = visible_band(
        q_len, keys, is_causal=False, window=(reduced_left, reduced_right), alignment=reduced_alignment
    )
    assert again == band


def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients():
    q, k, v = (t.requires_grad_() for t in qkv(q_len=9, kv_len=4))
    out = attend(q, k, v, right=0, alignment="lower_right")
    assert torch.equal(out[:, :, :5], torch.zeros_like(out[:, :, :5]))
    assert out[:, :, 5:].ne(0).all()
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))
    assert torch.equal(q.grad[:, :, :5], torch.zeros_like(q.grad[:, :, :5]))


@pytest.mark.parametrize("band", [{}, {"right": 0}, {"left": 2, "right": 1, "alignment": "lower_right"}])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradients(band, softcap):
    inputs = [t.requires_grad_() for t in qkv(batch=1, heads=2, kv_heads=1, q_len=3, kv_len=5, size=2)]
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, softcap=softcap, **band), inputs)


def test_softcap_bounds_the_scores():
    q, k, v = qkv()
    scores = q @ k.transpose(-1, -2) * 5.0
    want = torch.softmax(3.0 * torch.tanh(scores / 3.0), -1) @ v
    torch.testing.assert_close(attend(q, k, v, scale=5.0, softcap=3.0), want)


def test_half_precision_is_computed_in_float32():
    q, k, v = (t.bfloat16() for t in qkv(q_len=40, kv_len=40))
    want = attend(q.double(), k.double(), v.double())
    assert attend(q, k, v).dtype == torch.bfloat16
    error = (attend(q, k, v).double() - want).norm() / want.norm()
    assert error < 2.5e-3  # one rounding to eight bits


def test_rows_are_rows_of_the_whole():
    q, k, v = qkv(q_len=9, kv_len=12)
    rows = torch.tensor([0, 3, 8])
    band = {"left": 4, "right": 0, "alignment": "lower_right"}
    torch.testing.assert_close(attend(q, k, v, rows=rows, **band), attend(q, k, v, **band)[:, :, rows])


def test_dropout_keeps_the_mean_and_drops_the_share():
    v = torch.ones(1, 2, 64, 4, dtype=torch.float64)
    q, k, _ = qkv(batch=1, heads=2, kv_heads=2, q_len=64, kv_len=64, size=4)
    torch.manual_seed(0)
    out = attend(q, k, v, dropout_p=0.25)
    assert abs(float(out.mean()) - 1.0) < 0.05
    assert not torch.allclose(out, torch.ones_like(out))


@pytest.mark.parametrize("band", [{}, {"right": 0}, {"left": 2, "right": 1}])
def test_documents_do_not_see_each_other(band):
    lengths_q, lengths_k = [3, 1, 6], [3, 4, 6]
    offsets = [torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in (lengths_q, lengths_k)]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(sum(lengths_q), 4, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(sum(lengths_k), 2, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    got = attend_varlen(q, k, v, *offsets, 6, 7, **band)
    for document in range(3):
        rows = slice(offsets[0][document], offsets[0][document + 1])
        keys = slice(offsets[1][document], offsets[1][document + 1])
        one = [t[None].transpose(1, 2) for t in (q[rows], k[keys], v[keys])]
        want = attend(*one, alignment="lower_right", **band)[0].transpose(0, 1)
        torch.testing.assert_close(got[rows], want)
