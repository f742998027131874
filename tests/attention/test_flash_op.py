"""The operator of the FlashAttention packages, with stand-ins for their kernels: layouts, gradients, tracing."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from kernel_pytorch.attention import (
    AttentionError,
    AttentionShape,
    api,
    attention,
    attention_varlen,
    fa3,
    fa4,
    flash_op,
)
from kernel_pytorch.attention.probe import unsupported
from kernel_pytorch.attention.reference import attend, attend_varlen

from .flash_packages import Hopper, Interface

CPU = torch.device("cpu")
OFFSETS = torch.tensor([0, 7, 8, 20], dtype=torch.int32)


@pytest.fixture
def packages(monkeypatch):
    """Both packages, and a CPU taken for a Hopper GPU."""
    four, three = Interface(), Hopper()
    monkeypatch.setattr(fa4, "_interface", lambda: four)
    monkeypatch.setattr(torch.ops, "flash_attn_3", three, raising=False)
    monkeypatch.setattr(fa3, "importlib", SimpleNamespace(import_module=lambda _: None))
    for module in (fa3, fa4):
        monkeypatch.setattr(module, "missing", lambda: None)
        monkeypatch.setattr(module, "gpu_capability", lambda *_, **__: None)
    return SimpleNamespace(fa3=three, fa4=four)


def draw(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error_of(got, want):
    got, want = got.detach().double(), want.detach()
    return float((got - want).norm() / want.norm())


BANDS = [
    {},
    {"is_causal": True},
    {"window": (5, 3)},
    {"window": (5, None)},
    {"window": (5, 0)},
    {"is_causal": True, "softcap": 2.0},
]


@pytest.mark.parametrize("impl", ["fa4", "fa3+fa4"])
@pytest.mark.parametrize("kv_len", [24, 40])
@pytest.mark.parametrize("band", BANDS, ids=str)
def test_against_the_definition_with_gradients(packages, impl, kv_len, band):
    inputs = [draw(2, n, t, 16, seed=n + t).requires_grad_() for n, t in ((4, 24), (2, kv_len), (2, kv_len))]
    weight = draw(2, 4, 24, 16, seed=9)
    arguments = {"alignment": "lower_right", "enable_gqa": True, "scale": 0.3, **band}
    left, right = band.get("window", (None, 0 if band.get("is_causal") else None))
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want = attend(*exact, left=left, right=right, alignment="lower_right", scale=0.3, softcap=band.get("softcap", 0.0))
    got = attention(*inputs, impl=impl, **arguments)
    assert got.shape == want.shape
    assert error_of(got, want) < 1e-2
    expected = torch.autograd.grad(want, exact, weight.double())
    for gradient, right_one in zip(torch.autograd.grad(got, inputs, weight), expected, strict=True):
        assert error_of(gradient, right_one) < 1e-2
    assert packages.fa4.calls.count("backward") == 2  # the probe and this
    assert bool(packages.fa3.calls) == (impl == "fa3+fa4")


@pytest.mark.parametrize("window", [None, (5, None)])
def test_documents_with_gradients(packages, window):
    inputs = [draw(20, n, 16, seed=n).requires_grad_() for n in (4, 2, 3)][:2]
    inputs.append(draw(20, 2, 16, seed=3).requires_grad_())
    exact = [t.detach().double().requires_grad_() for t in inputs]
    weight = draw(20, 4, 16, seed=4)
    got = attention_varlen(*inputs, OFFSETS, OFFSETS, 12, 12, is_causal=True, window=window, impl="fa4")
    want = attend_varlen(*exact, OFFSETS, OFFSETS, 12, 12, right=0, left=window and window[0])
    assert error_of(got, want) < 1e-2
    expected = torch.autograd.grad(want, exact, weight.double())
    for gradient, right_one in zip(torch.autograd.grad(got, inputs, weight), expected, strict=True):
        assert error_of(gradient, right_one) < 1e-2


@pytest.mark.parametrize("packed", [False, True])
def test_eager_calls_are_what_the_operator_computes(packages, packed, monkeypatch):
    """With and without gradients; under whatever watches or transforms calls it is the operator that runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.add(str(func))
            return func(*args, **(kwargs or {}))

    shape = (20, 2, 16) if packed else (2, 2, 20, 16)
    inputs = [draw(*shape, seed=n).requires_grad_() for n in range(3)]
    weight = draw(*shape, seed=5)

    def run():
        if packed:
            out = attention_varlen(*inputs, OFFSETS, OFFSETS, 12, 12, is_causal=True, impl="fa4")
        else:
            out = attention(*inputs, is_causal=True, impl="fa4")
        return out, *torch.autograd.grad(out, inputs, weight)

    run()
    with Watch() as watch:
        want = run()
    assert {f"kernel_pytorch.flash_attention{which}.default" for which in ("", "_backward")} <= watch.seen
    real = torch.ops.kernel_pytorch.flash_attention
    monkeypatch.setattr(torch.ops.kernel_pytorch, "flash_attention", None)
    torch.testing.assert_close(run(), want)
    with torch.no_grad():
        if packed:
            out = attention_varlen(*inputs, OFFSETS, OFFSETS, 12, 12, is_causal=True, impl="fa4")
        else:
            out = attention(*inputs, is_causal=True, impl="fa4")
    torch.testing.assert_close(out, want[0].detach())
    assert not out.requires_grad
    monkeypatch.setattr(torch.ops.kernel_pytorch, "flash_attention", real)
    with torch.autograd.profiler.profile() as profile:
        run()
    assert any(event.name == "kernel_pytorch::flash_attention" for event in profile.function_events)


def test_gradients_of_gradients_are_refused(packages):
    q = draw(2, 2, 20, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(attention(q, q, q, impl="fa4").sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), q)


@pytest.mark.parametrize(("impl", "packed"), [("fa4", False), ("fa4", True), ("fa3+fa4", False)])
def test_compiles_whole_with_gradients(packages, impl, packed):
    torch._dynamo.reset()

    def loss(q, k, v):
        if packed:
            out = attention_varlen(q, k, v, OFFSETS, OFFSETS, 12, 12, is_causal=True, impl=impl)
        else:
            out = attention(q, k, v, is_causal=True, impl=impl, enable_gqa=True)
        return (out.float() ** 2).sum()

    shape = (20, 2, 16) if packed else (2, 2, 20, 16)
    inputs = [draw(*shape, seed=n).requires_grad_() for n in range(3)]
    want = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), want)


def test_operator_is_registered_as_pytorch_wants_it(packages):
    q, k = draw(2, 20, 4, 16).requires_grad_(), draw(2, 24, 2, 16, seed=1).requires_grad_()
    arguments = (q, k, k.detach().clone().requires_grad_(), None, None, 20, 24, 0.25, -1, 0, 0.0, "fa4", "fa4")
    torch.library.opcheck(
        torch.ops.kernel_pytorch.flash_attention.default,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    with torch.no_grad():
        out, lse = torch.ops.kernel_pytorch.flash_attention(*arguments)
        torch.library.opcheck(
            torch.ops.kernel_pytorch.flash_attention_backward.default,
            (torch.ones_like(out), *(t.detach() for t in arguments[:3]), out, lse, *arguments[3:11], "fa4"),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_a_build_without_backward_serves_inference(packages):
    q = draw(1, 2, 200, 16)
    attention(q, q, q, impl="fa3")
    assert packages.fa3.calls[-1] == "forward splits=1"
    with pytest.raises(AttentionError, match="does not support backward"):
        attention(q.requires_grad_(), q, q, impl="fa3")


def test_few_queries_leave_the_splitting_to_the_package(packages):
    q, k = draw(1, 2, 1, 16), draw(1, 2, 300, 16)
    attention(q, k, k, impl="fa3")
    assert packages.fa3.calls[-1] == "forward splits=0"


def test_fp8_is_coarse_and_for_inference(packages):
    q, k, v = draw(2, 4, 64, 64), draw(2, 2, 64, 64, seed=1), draw(2, 2, 64, 64, seed=2)
    want = attend(q.double(), k.double(), v.double(), right=0)
    got = attention(q, k * 100, v * 1000, is_causal=True, scale=0.125 / 100, enable_gqa=True, impl="fa3_fp8")
    error = float((got.double() / 1000 - want).norm() / want.norm())
    assert got.dtype == torch.bfloat16
    assert 1e-2 < error < 8e-2
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=False)
    again = compiled(q, k * 100, v * 1000, is_causal=True, scale=0.125 / 100, enable_gqa=True, impl="fa3_fp8")
    torch.testing.assert_close(again, got)
    with pytest.raises(AttentionError, match="forward only"):
        attention(q.requires_grad_(), k, v, enable_gqa=True, impl="fa3_fp8")


def test_alignment_that_the_packages_do_not_have(packages):
    shape = AttentionShape(1, 2, 2, 30, 20, 16, is_causal=True)
    assert "ends the diagonal at lower_right" in unsupported("fa4", shape, CPU, backward=False).reason
    # More keys than queries, upper left: the keys that no query sees are cut off, and the rest is square.
    q, k = draw(1, 2, 20, 16), draw(1, 2, 30, 16)
    got = attention(q, k, k, is_causal=True, impl="fa4")
    torch.testing.assert_close(got, attend(q, k, k, right=0), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 20}, "multiples of 8"),
        ({"head_dim": 512}, "up to 256"),
        ({"dtype": torch.float32}, "float16 and bfloat16"),
        ({"mask": True}, "no attn_mask"),
        ({"dropout": 0.1}, "no dropout"),
        ({"value_dim": 8}, "equal head sizes"),
    ],
)
def test_what_the_packages_do_not_compute(packages, change, reason):
    shape = AttentionShape(**{"batch": 1, "heads": 2, "kv_heads": 2, "q_len": 8, "kv_len": 8, "head_dim": 16, **change})
    for name in ("fa3", "fa4", "fa3+fa4"):
        assert reason in unsupported(name, shape, CPU, backward=True).reason


def test_views_that_bulk_loads_cannot_read_are_copied():
    whole = draw(2, 10, 4, 24)
    assert flash_op.aligned(whole) is whole
    assert flash_op.aligned(whole.transpose(1, 2)).data_ptr() == whole.data_ptr()
    assert flash_op.aligned(whole[..., 8:]).data_ptr() == whole[..., 8:].data_ptr()
    for view in (whole[..., 1:9], whole.transpose(-1, -2), whole.flatten(2)[..., :93].unflatten(-1, (3, 31))[..., :24]):
        copied = flash_op.aligned(view)
        assert torch.equal(copied, view)
        assert copied.is_contiguous()


def test_without_the_packages_the_reason_says_what_to_install(monkeypatch):
    fa3.missing.cache_clear()
    fa4.missing.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install" in fa3.missing().fix
    assert "flash-attn-4" in fa4.missing().fix
    fa3.missing.cache_clear()
    fa4.missing.cache_clear()
    assert api.implementations()["fa4"].packages[0] == "flash-attn-4"


@pytest.mark.parametrize(("head_dim", "fits"), [(72, False), (80, True)])
def test_fp8_takes_head_sizes_that_16_divides(packages, head_dim, fits):
    shape = AttentionShape(1, 7, 7, 33, 33, head_dim, torch.float16, is_causal=True)
    skip = unsupported("fa3_fp8", shape, CPU, backward=False)
    assert (skip is None) is fits
    assert fits or "16 divides" in skip.reason
