"""The modules against PyTorch's own and against plain formulas."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernel_pytorch.attention import AttentionError, MultiheadAttention, RotaryAttention

KINDS = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"kdim": 12, "vdim": 20, "batch_first": True},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
]


def pair(**kind):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(16, 4, dtype=torch.float64, **kind).eval()
    ours = MultiheadAttention(16, 4, dtype=torch.float64, **kind).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_as_pytorchs(kind, need_weights):
    theirs, ours = pair(**kind)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert isinstance(ours, nn.MultiheadAttention)
    query = torch.randn(3, 5, 16, dtype=torch.float64)
    key = torch.randn(3, 5, kind.get("kdim", 16), dtype=torch.float64)
    value = torch.randn(3, 5, kind.get("vdim", 16), dtype=torch.float64)
    arguments = (query, key, value)
    want, weights = theirs(*arguments, need_weights=need_weights)
    got, our_weights = ours(*arguments, need_weights=need_weights)
    torch.testing.assert_close(got, want)
    assert (weights is None) == (our_weights is None)
    if need_weights:
        torch.testing.assert_close(our_weights, weights)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("mask", [None, "bool", "float", "per head"])
def test_multihead_masks_mean_what_they_mean_there(need_weights, padding, mask):
    theirs, ours = pair(batch_first=True)
    x = torch.randn(3, 6, 16, dtype=torch.float64)
    hidden = torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)
    padded = torch.arange(6)[None] >= torch.tensor([6, 4, 5])[:, None]
    as_float = lambda m: torch.zeros_like(m, dtype=torch.float64).masked_fill(m, float("-inf"))  # noqa: E731
    masks = {None: None, "bool": hidden, "float": as_float(hidden), "per head": hidden.expand(12, 6, 6)}
    paddings = {None: None, "bool": padded, "float": as_float(padded)}
    if mask == "per head" and padding == "float":
        masks["per head"] = as_float(masks["per head"])
    if {padding, mask} == {"bool", "float"}:  # PyTorch warns that this mix is deprecated
        masks[mask], paddings[padding] = masks["float" if mask else None], paddings["float"]
        masks[mask] = as_float(hidden)
    arguments = {"attn_mask": masks[mask], "key_padding_mask": paddings[padding], "need_weights": need_weights}
    torch.testing.assert_close(ours(x, x, x, **arguments)[0], theirs(x, x, x, **arguments)[0])


def test_multihead_causal_hint_unbatched_and_gradients():
    theirs, ours = pair()
    x = torch.randn(6, 16, dtype=torch.float64)
    hidden = torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)
    for module in (theirs, ours):
        module(x, x, x, attn_mask=hidden, is_causal=True, need_weights=False)[0].square().sum().backward()
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=name)
    with pytest.raises(AttentionError, match="hint"):
        ours(x, x, x, is_causal=True, need_weights=False)


def test_multihead_drops_in_training_only():
    ours = MultiheadAttention(16, 4, dropout=0.5, batch_first=True)
    x = torch.randn(2, 6, 16)
    run = lambda: ours(x, x, x, need_weights=False)[0]  # noqa: E731
    assert not torch.equal(run(), run())
    ours.eval()
    torch.testing.assert_close(run(), run())


def test_multihead_compiles_whole():
    torch._dynamo.reset()
    ours = MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 6, 16)
    want = ours(x, x, x, need_weights=False)[0]
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=False)
    got = compiled(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(got, want)
    got.sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


def rotary(**kind):
    torch.manual_seed(0)
    return RotaryAttention(16, 4, **{"num_kv_heads": 2, "dtype": torch.float64, **kind}).eval()


def test_rotary_by_its_formula():
    module = rotary(bias=True)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    q = module.q_proj(x).view(2, 7, 4, 4).transpose(1, 2)
    k = module.k_proj(x).view(2, 7, 2, 4).transpose(1, 2)
    v = module.v_proj(x).view(2, 7, 2, 4).transpose(1, 2)

    def turn(t):
        # A pair is a complex number; its position multiplies it by a unit one.
        pairs = torch.complex(t[..., :2].contiguous(), t[..., 2:].contiguous())
        speed = 10_000.0 ** -(torch.arange(0, 4, 2, dtype=torch.float64) / 4)
        angle = torch.arange(7, dtype=torch.float64)[:, None] * speed
        turned = pairs * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag), -1)

    out = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True, enable_gqa=True)
    want = module.o_proj(out.transpose(1, 2).reshape(2, 7, 16))
    torch.testing.assert_close(module(x)[0], want)
    assert sorted(module.state_dict()) == sorted(f"{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias"))


@pytest.mark.parametrize("window", [None, (3, 0)])
def test_rotary_with_a_cache_is_rotary_without(window):
    module = rotary(window=window)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    whole, _ = module(x)
    past, parts = None, []
    for piece in x.split([4, 1, 3, 1], dim=1):
        out, past = module(piece, past=past)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert past[0].shape == (2, 2, 9, 4)


def test_rotary_depends_on_distances_alone():
    module = rotary()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    near, _ = module(x)
    far, _ = module(x, positions=torch.arange(1000, 1009).expand(2, 9))
    torch.testing.assert_close(near, far, atol=1e-9, rtol=1e-9)


def test_rotary_compiles_whole_and_learns():
    torch._dynamo.reset()
    module = rotary(dtype=torch.float32).train()
    x = torch.randn(2, 8, 16)
    want = module(x)[0]
    again = copy.deepcopy(module)
    compiled = torch.compile(again, backend="aot_eager", fullgraph=True, dynamic=False)
    got = compiled(x)[0]
    torch.testing.assert_close(got, want)
    want.square().sum().backward()
    got.square().sum().backward()
    for a, b in zip(module.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_rotary_says_what_does_not_fit():
    with pytest.raises(AttentionError, match="does not divide embed_dim"):
        RotaryAttention(16, 3)
    with pytest.raises(AttentionError, match="turns pairs"):
        RotaryAttention(12, 4)
    with pytest.raises(AttentionError, match="do not divide"):
        RotaryAttention(16, 4, 3)
