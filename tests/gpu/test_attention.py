"""Attention on a real device: every implementation that is installed, alone and inside compiled training steps."""

from __future__ import annotations

import pytest
import torch

from kernel_pytorch.attention import (
    AttentionError,
    AttentionShape,
    RotaryAttention,
    api,
    attention,
    attention_varlen,
    choose,
    fa3,
    fa4,
    implementations,
    unsupported,
)
from kernel_pytorch.attention.probe import does_not_fit, make_case, relative_errors
from kernel_pytorch.attention.reference import attend
from kernel_pytorch.attention.shapes import AWKWARD

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # The packages' imports and torch.compile warn of their own affairs; a warning here would read as "not installed".
    pytest.mark.filterwarnings("ignore"),
]
QUICK = [name for name in implementations() if name != "flex"]
LEFT_OUT = "build does not support"


@pytest.fixture(autouse=True)
def fresh_choices(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNEL_PYTORCH_CACHE", str(tmp_path))
    api.forget()
    yield
    api.forget()


def device():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize("named", AWKWARD, ids=lambda n: n.name)
def test_what_claims_to_fit_computes_it(named):
    shape = named.shape.canonical()
    ran = []
    for name in QUICK:
        backward = name != "fa3_fp8"
        if does_not_fit(implementations()[name], shape, device(), backward=backward) is not None:
            continue
        skip = unsupported(name, shape, device(), backward=backward)
        if name.startswith("fa3") and skip is not None and LEFT_OUT in skip.reason:
            continue  # the build says that it was made without backward, or without softcap
        assert skip is None, skip.reason
        ran.append(name)
    assert "math" in ran


def test_flex_computes_windows_and_softcap():
    shape = AttentionShape(1, 4, 2, 300, 400, 64, window=(100, 20), alignment="lower_right", softcap=20.0)
    skip = unsupported("flex", shape, "cuda", backward=True)
    assert skip is None, skip.reason


@pytest.mark.parametrize("backward", [False, True])
def test_strided_inputs(backward):
    (named,) = (n for n in AWKWARD if n.strided)
    case = make_case(named.shape, device(), backward=False)
    wide = [torch.cat((t, t[..., :1]), -1)[..., :-1] for t in case.inputs()]
    want = attend(*(t.double() for t in wide), right=0)
    for name in QUICK:
        if name == "fa3_fp8" or unsupported(name, named.shape, device(), backward=backward) is not None:
            continue
        inputs = [t.detach().requires_grad_(backward) for t in wide]
        out = attention(*inputs, is_causal=True, enable_gqa=True, impl=name)
        error = float((out.detach().double() - want).norm() / want.norm())
        assert error < 1e-2, name
        if backward:
            assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), inputs)), name


@pytest.mark.parametrize("impl", ["fa4", "fa3+fa4", "fa3+cudnn", "fa3", "cudnn", "flash", "efficient", "sdpa", None])
def test_a_compiled_training_step_is_the_eager_one(impl):
    shape = AttentionShape(2, 8, 2, 512, 512, 64, is_causal=True)
    if impl is not None:
        skip = unsupported(impl, shape, "cuda", backward=True)
        if skip is not None:
            pytest.skip(skip.reason)
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = RotaryAttention(512, 8, 2, impl=impl, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 512, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def grads(call):
        loss = call(x)[0].float().square().mean()
        return torch.autograd.grad(loss, [x, *module.parameters()])

    eager = grads(module)
    compiled = grads(torch.compile(module, fullgraph=True, dynamic=False))
    for a, b in zip(eager, compiled, strict=True):
        assert float((a.double() - b.double()).norm() / a.double().norm()) < 2e-2


def test_the_choice_is_right_and_kept():
    shape = AttentionShape(2, 16, 16, 2048, 2048, 128, is_causal=True)
    first = choose(shape, "cuda", backward=True)
    assert first.measured
    assert first.device_ms[first.compiled] <= 1.03 * min(first.device_ms.values())
    api.forget()
    assert not choose(shape, "cuda", backward=True).measured
    case = make_case(shape, device(), backward=True)
    errors = relative_errors(case, lambda c: attention(*c.inputs(), is_causal=True), backward=True, exact=True)
    assert max(errors.values()) < 1e-2, errors


def test_rows_that_no_kernel_can_load_are_right_by_choice():
    """SDPA itself is wrong at them (torch 2.11, cuDNN), and SDPA may be the choice."""
    (named,) = (n for n in AWKWARD if n.strided)
    case = make_case(named.shape, device(), backward=False)
    wide = [torch.cat((t, t[..., :1]), -1)[..., :-1] for t in case.inputs()]
    want = attend(*(t.double() for t in wide), right=0)
    for impl in (None, "sdpa"):
        got = attention(*wide, is_causal=True, enable_gqa=True, impl=impl)
        assert float((got.double() - want).norm() / want.norm()) < 1e-2, impl
    compiled = torch.compile(lambda *t: attention(*t, is_causal=True, enable_gqa=True, impl="sdpa"), fullgraph=True)
    assert float((compiled(*wide).double() - want).norm() / want.norm()) < 1e-2


def test_documents_by_choice():
    offsets = torch.tensor([0, 700, 1000, 1001, 2048], dtype=torch.int32, device="cuda")
    q = torch.randn(2048, 8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(2048, 8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    got = attention_varlen(q, k, v, offsets, offsets, 1047, 1047, is_causal=True)
    want = attention_varlen(q, k, v, offsets, offsets, 1047, 1047, is_causal=True, impl="math")
    assert float((got.double() - want.double()).norm() / want.double().norm()) < 1e-2
    weight = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), weight), torch.autograd.grad(want, (q, k, v), weight), strict=True
    ):
        assert float((a.double() - b.double()).norm() / b.double().norm()) < 2e-2


@pytest.mark.parametrize("package", [fa3, fa4], ids=["fa3", "fa4"])
def test_a_missing_package_is_an_error_with_its_reason(package):
    skip = package.missing()
    if skip is None:
        pytest.skip("the package is installed")
    q = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(AttentionError, match="cannot compute this"):
        attention(q, q, q, impl="fa3" if package is fa3 else "fa4")


def in_memory(case, order):
    """Lay queries, keys and values out as models do: `bhsd` as they are, `bshd` as projections leave them."""
    if order == "bhsd":
        return [t.detach().clone().requires_grad_() for t in case.inputs()]
    return [t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in case.inputs()]


@pytest.mark.parametrize("first", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", ["fa4", "fa3+fa4", "fa3+cudnn", "cudnn", "flash", "sdpa"])
@pytest.mark.parametrize("tokens", [128, 512, 4096])
def test_gradients_do_not_depend_on_the_layout_that_came_first(name, first, tokens):
    """What was compiled for one layout, of the inputs or of the gradient, must not show in another."""
    shape = AttentionShape(2, 32, 8, tokens, tokens, 128, is_causal=True)
    if unsupported(name, shape, device(), backward=True) is not None:
        pytest.skip(f"{name} does not run here")
    right = "math" if tokens < 1024 else "fa4" if fa4.missing() is None else "flash"
    case = make_case(shape, device(), backward=True, seed=3)
    weight = torch.randn(2, 32, tokens, 128, device=device(), dtype=torch.bfloat16)
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2)
    inputs = in_memory(case, "bhsd")
    want = torch.autograd.grad(attend_in(case, inputs, right), inputs, weight)
    for order in (first, "bshd" if first == "bhsd" else "bhsd"):
        for gradient in (weight, turned) if first == "bhsd" else (turned, weight):
            inputs = in_memory(case, order)
            got = torch.autograd.grad(attend_in(case, inputs, name), inputs, gradient)
            for a, b in zip(got, want, strict=True):
                assert float((a.double() - b.double()).norm() / b.double().norm()) < 2e-2, order


def attend_in(case, inputs, name):
    return attention(*inputs, is_causal=case.shape.is_causal, enable_gqa=True, impl=name)
