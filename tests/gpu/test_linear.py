"""Measured products on the GPU: right, kept, and out of the way where they cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kernel_pytorch.backends.nvidia import cublaslt
from kernel_pytorch.ops.linear import choice, linear, unsupported
from kernel_pytorch.ops.linear.shapes import AWKWARD

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cublaslt.unavailable() is not None, reason="cuBLASLt cannot be called here"),
]

BIG = (4096, 2048, 1536)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNEL_PYTORCH_CACHE", str(tmp_path))
    choice.forget()
    yield
    choice.forget()


def check(shape, dtype, *, bias: bool) -> None:
    torch.manual_seed(0)
    tokens, inside, outside = shape
    sizes = ((tokens, inside), (outside, inside), (outside,))
    leaves = [torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in sizes[: 2 + bias]]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    assert unsupported(*leaves) is None
    y, want = linear(*leaves), nn.functional.linear(*exact)
    dy = torch.randn_like(y)
    got = [y, *torch.autograd.grad(y, leaves, dy)]
    wanted = [want, *torch.autograd.grad(want, exact, dy.double())]
    unit = torch.finfo(dtype).eps
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == dtype
        assert a.shape == b.shape
        if a.numel():
            assert float((a.double() - b).norm() / b.norm().clamp_min(1e-30)) < unit


@pytest.mark.parametrize("dtype", cublaslt.DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [BIG, (300, 4096, 6144), *AWKWARD])
def test_right_whatever_computes_it(shape, bias, dtype) -> None:
    check(shape, dtype, bias=bias)


def test_every_algorithm_is_right() -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((1024, 2048), (2048, 512)))
    product = cublaslt.Product(1024, 512, 2048, transpose_a=False, transpose_b=False, dtype=torch.bfloat16, device=0)
    want, out = a.double() @ b.double(), torch.empty(1024, 512, device="cuda", dtype=torch.bfloat16)
    assert len(product.algorithms) > 1
    for algorithm in product.algorithms:
        out.zero_()
        product.compute(cublaslt.buffer(algorithm), a, b, out)
        assert float((out.double() - want).norm() / want.norm()) < torch.finfo(torch.bfloat16).eps


def test_a_choice_is_measured_once_and_kept(monkeypatch) -> None:
    check(BIG, torch.bfloat16, bias=False)
    known = choice.measured_choices()
    assert len(known) == 3
    assert all(entry["candidates"] > 1 and entry["ms"] <= entry["pytorch_ms"] for entry in known.values())
    choice.forget()
    monkeypatch.setattr(choice, "_measure", lambda *_: pytest.fail("measured again"))
    check(BIG, torch.bfloat16, bias=False)


def test_a_capture_uses_what_is_known_and_measures_nothing(monkeypatch) -> None:
    x, weight = (torch.randn(4096, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = weight[:1536].contiguous()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        want = nn.functional.linear(x, weight)
        with monkeypatch.context() as patch, torch.cuda.graph(graph):
            patch.setattr(choice, "_measure", lambda *_: pytest.fail("measured in a capture"))
            early = linear(x, weight)
        graph.replay()
        assert torch.allclose(early, want, atol=1.0, rtol=1e-2)
        linear(x, weight)
        second = torch.cuda.CUDAGraph()
        with torch.cuda.graph(second):
            late = linear(x, weight)
        second.replay()
        assert torch.allclose(late, want, atol=1.0, rtol=1e-2)


def test_a_view_at_an_odd_address() -> None:
    flat = torch.randn(4096 * 2048 + 1, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1536, 2048, device="cuda", dtype=torch.bfloat16)
    x = flat[1:].view(4096, 2048)
    want = x.double() @ weight.double().t()
    assert float((linear(x, weight).double() - want).norm() / want.norm()) < torch.finfo(torch.bfloat16).eps


def test_compiled_without_a_graph_break() -> None:
    x = torch.randn(2, 2048, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer = nn.Linear(2048, 1536, device="cuda", dtype=torch.bfloat16)
    want = torch.autograd.grad(nn.functional.silu(layer(x)).float().sum(), [x, layer.weight, layer.bias])
    run = torch.compile(lambda x: nn.functional.silu(linear(x, layer.weight, layer.bias)), fullgraph=True)
    got = torch.autograd.grad(run(x).float().sum(), [x, layer.weight, layer.bias])
    for a, b in zip(got, want, strict=True):
        assert float((a.double() - b.double()).norm() / b.double().norm()) < 2e-2


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no FP8 here")
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("forms", [(torch.float8_e4m3fn,) * 2, (torch.float8_e5m2, torch.float8_e4m3fn)])
def test_products_in_float8_by_every_algorithm_are_right(forms, fast) -> None:
    torch.manual_seed(0)
    rows, columns, inner = 1024, 2048, 4096
    a, b = (torch.randn(s, inner, device="cuda").to(form) for s, form in zip((rows, columns), forms, strict=True))
    scales = tuple(torch.tensor([x], device="cuda") for x in (0.5, 3.0))
    want = (a.double() * 0.5) @ (b.double() * 3.0).t()
    formats = cublaslt.Float8(*forms, fast)
    product = cublaslt.Product(
        rows, columns, inner, transpose_a=False, transpose_b=True, dtype=torch.bfloat16, device=0, float8=formats
    )
    out = torch.empty(rows, columns, device="cuda", dtype=torch.bfloat16)
    assert len(product.algorithms) > 1
    for algorithm in product.algorithms:
        out.zero_()
        product.compute(cublaslt.buffer(algorithm), a, b, out, None, scales)
        assert float((out.double() - want).norm() / want.norm()) < torch.finfo(torch.bfloat16).eps
    got = choice.multiply_float8(a, b, *scales, dtype=torch.bfloat16, fast=fast)
    assert float((got.double() - want).norm() / want.norm()) < torch.finfo(torch.bfloat16).eps
    assert any("e4m3fn" in name for name in choice.measured_choices())
