"""The public call: semantics of SDPA, errors, and `torch.compile` without graph breaks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernel_pytorch.attention import (
    AttentionError,
    AttentionShape,
    api,
    attention,
    attention_varlen,
    choose,
    implementations,
    sdpa,
    unsupported,
)
from kernel_pytorch.attention.probe import make_case
from kernel_pytorch.attention.reference import attend, attend_varlen
from kernel_pytorch.attention.shapes import AWKWARD, small

CPU = torch.device("cpu")
ON_CPU = ("flash", "sdpa", "math")


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("impl", [None, *ON_CPU])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 6])
@pytest.mark.parametrize("kv_len", [20, 33, 40])
def test_as_sdpa(impl, is_causal, kv_heads, kv_len):
    q, k, v = draw(3, 6, 33, 16), draw(3, kv_heads, kv_len, 16, seed=1), draw(3, kv_heads, kv_len, 16, seed=2)
    if impl == "flash" and is_causal and kv_len < 33:
        impl = None
    want = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, is_causal=is_causal, enable_gqa=True, impl=impl), want)


@pytest.mark.parametrize("impl", [None, *ON_CPU])
def test_gradients_as_sdpa(impl):
    inputs = [draw(2, 4, 30, 8, seed=n, dtype=torch.float64).requires_grad_() for n in range(3)]
    weight = draw(2, 4, 30, 8, seed=4, dtype=torch.float64)
    want = torch.autograd.grad(F.scaled_dot_product_attention(*inputs, is_causal=True), inputs, weight)
    got = torch.autograd.grad(attention(*inputs, is_causal=True, impl=impl), inputs, weight)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", ON_CPU)
def test_gradcheck_of_groups_and_a_cache(impl):
    q = draw(1, 2, 3, 4, dtype=torch.float64).requires_grad_()
    k, v = (draw(1, 1, 5, 4, dtype=torch.float64, seed=n).requires_grad_() for n in (1, 2))
    assert torch.autograd.gradcheck(
        lambda *t: attention(*t, is_causal=True, enable_gqa=True, impl=impl), (q, k, v), fast_mode=True
    )


@pytest.mark.parametrize("named", [n for n in AWKWARD if not n.shape.packed], ids=lambda n: n.name)
def test_awkward_shapes(named):
    shape = small(named).shape
    q, k, v = make_case(shape, CPU, backward=False).inputs()
    if named.strided:
        q, k, v = (torch.cat((t, t[..., :1]), -1)[..., :-1] for t in (q, k, v))
        assert q.stride(-2) % 2
    left, right = shape.window or (None, None)
    right = 0 if shape.is_causal else right
    want = attend(
        q.double(), k.double(), v.double(), left=left, right=right, alignment=shape.alignment, softcap=shape.softcap
    )
    for name in implementations():
        if unsupported(name, shape, CPU, backward=False) is None and name != "flex":
            got = attention(
                q,
                k,
                v,
                is_causal=shape.is_causal,
                window=shape.window,
                alignment=shape.alignment,
                softcap=shape.softcap,
                enable_gqa=True,
                impl=name,
            )
            torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-4)


def test_documents():
    offsets = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    q, k, v = draw(20, 4, 8), draw(20, 2, 8, seed=1), draw(20, 2, 8, seed=2)
    want = attend_varlen(q.double(), k.double(), v.double(), offsets, offsets, 12, 12, right=0)
    got = attention_varlen(q, k, v, offsets, offsets, 12, 12, is_causal=True)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("impl", [None, *ON_CPU])
def test_mask(impl):
    q, k, v = draw(2, 4, 20, 8), draw(2, 4, 20, 8, seed=1), draw(2, 4, 20, 8, seed=2)
    for mask in (draw(20, 20) > 0, draw(2, 1, 20, 20), draw(1, 4, 1, 20) > -0.5):
        mask = mask | torch.eye(20, dtype=torch.bool) if mask.dtype == torch.bool else mask
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(attention(q, k, v, attn_mask=mask, impl=impl), want)


def test_dropout_goes_to_what_has_it():
    q = draw(2, 4, 64, 8)
    ones = torch.ones(2, 4, 64, 8)
    torch.manual_seed(0)
    out = attention(q, q, ones, dropout_p=0.5)
    assert abs(float(out.mean()) - 1.0) < 0.05
    assert float(out.std()) > 0.05
    with pytest.raises(AttentionError, match="no dropout"):
        attention(q, q, ones, dropout_p=0.5, impl="flash")


def test_autocast_is_sdpas():
    q = draw(2, 4, 16, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = attention(q, q, q), F.scaled_dot_product_attention(q, q, q)
    assert got.dtype == want.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "fast"}, "no attention implementation 'fast'"),
        ({"impl": "fa4"}, "runs on NVIDIA GPUs, the tensors are on cpu"),
        ({"impl": "cudnn"}, "cannot compute this"),
        ({"impl": "flash", "softcap": 3.0}, "has no softcap"),
        ({"impl": "flash", "window": (3, 0)}, "no sliding window"),
        ({"alignment": "middle"}, "upper_left"),
        ({"window": (-1, 0)}, "window is"),
        ({"softcap": -1.0}, "softcap is 0 or above"),
        ({"dropout_p": 1.5}, "probability"),
        ({"query": draw(2, 6, 5, 8)}, "enable_gqa=True|6 query heads"),
        ({"query": draw(2, 6, 5, 8), "enable_gqa": True}, "do not divide"),
        ({"query": draw(2, 4, 5, 16)}, "query heads have size 16"),
        ({"query": draw(3, 4, 5, 8)}, "batch sizes differ"),
        ({"query": draw(4, 5, 8)}, "got 3, 4 and 4"),
        ({"query": draw(2, 4, 5, 8).half()}, "one floating dtype"),
        ({"value": draw(2, 4, 7, 8)}, "key and value differ"),
        ({"attn_mask": torch.ones(5, 5, dtype=torch.bool), "is_causal": True}, "exclude each other"),
    ],
)
def test_bad_arguments_are_told(change, message):
    arguments = {"query": draw(2, 4, 5, 8), "key": draw(2, 4, 5, 8), "value": draw(2, 4, 5, 8), **change}
    with pytest.raises(AttentionError, match=message) as caught:
        attention(**arguments)
    assert isinstance(caught.value, ValueError)


def test_bad_documents_are_told():
    q, offsets = draw(20, 4, 8), torch.tensor([0, 20], dtype=torch.int32)
    with pytest.raises(AttentionError, match="int32"):
        attention_varlen(q, q, q, offsets.long(), offsets, 20, 20)
    with pytest.raises(AttentionError, match="3 and 3 dimensions"):
        attention_varlen(q[None], q, q, offsets, offsets, 20, 20)
    with pytest.raises(AttentionError, match="1 documents of queries, 2 of keys"):
        attention_varlen(q, q, q, offsets, torch.tensor([0, 3, 20], dtype=torch.int32), 20, 20)
    with pytest.raises(AttentionError, match="no packed documents"):
        attention_varlen(q, q, q, offsets, offsets, 20, 20, impl="efficient")


def test_every_implementation_says_why_it_cannot_run_here():
    shape = AttentionShape(1, 2, 2, 16, 16, 16, torch.bfloat16)
    for name in implementations():
        skip = unsupported(name, shape, "cpu", backward=True)
        assert (skip is None) == (name in ON_CPU), skip
        assert skip is None or skip.reason


class Counting:
    """A backend of `torch.compile` that counts graphs."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs.append(graph)
        return aot_eager(graph, inputs)


@pytest.mark.parametrize("impl", [None, *ON_CPU])
def test_compiles_whole_with_gradients(impl):
    torch._dynamo.reset()
    inputs = [draw(2, 4, 30, 8, seed=n).requires_grad_() for n in range(3)]
    want = torch.autograd.grad(attention(*inputs, is_causal=True, impl=impl).sum(), inputs)
    count = Counting()
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, is_causal=True, impl=impl), backend=count, fullgraph=True, dynamic=False
    )
    got = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    torch.testing.assert_close(got, want)
    assert len(count.graphs) == 1


def test_compiled_documents():
    torch._dynamo.reset()
    offsets = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    q = draw(20, 4, 8)
    eager = attention_varlen(q, q, q, offsets, offsets, 12, 12, is_causal=True)
    compiled = torch.compile(attention_varlen, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(q, q, q, offsets, offsets, 12, 12, is_causal=True), eager)


def test_dynamic_lengths_share_a_graph_within_a_class():
    torch._dynamo.reset()
    count = Counting()
    compiled = torch.compile(
        lambda q: attention(q, q, q, is_causal=True, impl="math"), backend=count, fullgraph=True, dynamic=True
    )
    graphs = []
    for tokens in (33, 40, 64, 65):
        q = draw(2, 4, tokens, 8)
        torch.testing.assert_close(compiled(q), F.scaled_dot_product_attention(q, q, q, is_causal=True))
        graphs.append(len(count.graphs))
    assert graphs[0] == graphs[1] == graphs[2] < graphs[3]


def test_compiling_measures_nothing():
    torch._dynamo.reset()
    q = draw(2, 4, 30, 8)
    compiled = torch.compile(lambda q: attention(q, q, q), backend="aot_eager", fullgraph=True, dynamic=False)
    with pytest.raises(Exception, match=r"torch\.compile does not measure"):
        compiled(q)
    choose(AttentionShape(2, 4, 4, 30, 30, 8, torch.float32), "cpu", backward=False)
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(q), F.scaled_dot_product_attention(q, q, q))


def test_what_was_asked_is_looked_up_and_what_differs_is_not():
    q, k = draw(2, 4, 30, 8), draw(2, 2, 30, 8, seed=1)
    for _ in range(2):
        attention(q, k, k, enable_gqa=True)
    assert len(api._ready) == 1
    with pytest.raises(AttentionError, match="4 query heads and 2 key heads"):
        attention(q, k, k)
    attention(q, k, k, enable_gqa=True, is_causal=True, scale=0.3)
    attention(q, k, k, enable_gqa=True, is_causal=True, scale=0.2)
    assert len(api._ready) == 2
    attention(q.requires_grad_(), k, k, enable_gqa=True)
    assert len(api._ready) == 3
    with torch.no_grad():
        attention(q, k, k, enable_gqa=True)
    with pytest.raises(AttentionError, match="one floating dtype"):
        attention(q, k.double(), k, enable_gqa=True)
    attention(q, k, k, enable_gqa=True, window=[3, 0])
    attention(q, k, k, enable_gqa=True, window=(3, 0))
    assert len(api._ready) == 4


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(api, "_MOST_READY", 5)
    for tokens in range(1, 20):
        q = draw(1, 1, tokens, 8)
        torch.testing.assert_close(attention(q, q, q, impl="math"), F.scaled_dot_product_attention(q, q, q))
        assert len(api._ready) <= 5
        assert len(api._answers) <= 5


def test_rows_are_copied_only_where_a_kernel_cannot_load_them():
    even = draw(2, 4, 30, 16).bfloat16()
    for tensor in (even, even.transpose(1, 2), even.float()[..., :15], even[:, :, 1:], even[:, :, :, :8]):
        assert sdpa._readable(tensor) is tensor
    flat = draw(2 * 4 * 30 * 16 + 8).bfloat16()
    odd = (even[..., :15].contiguous(), flat[1:-7].view(2, 4, 30, 16), even.transpose(2, 3))
    for tensor in odd:
        copy = sdpa._readable(tensor)
        assert copy is not tensor
        assert torch.equal(copy, tensor)
