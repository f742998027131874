"""The fused kernels on a real GPU: against fp64 at training and awkward shapes, compiled, and repeatable."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kernel_pytorch.ops.gated_mlp import gated_mlp
from kernel_pytorch.ops.gated_mlp.reference import ACTIVATIONS
from kernel_pytorch.ops.gated_mlp.shapes import AWKWARD as GATED_AWKWARD
from kernel_pytorch.ops.layer_norm import layer_norm
from kernel_pytorch.ops.rms_norm import rms_norm
from kernel_pytorch.ops.rope import rope
from kernel_pytorch.ops.rope.shapes import AWKWARD as ROPE_AWKWARD

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
]
ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
# Each shape and dtype compiles kernels of its own, so the awkward ones are in bfloat16 and a few in the others.
NORMS = [(s, torch.bfloat16) for s in [(1, 64), (2, 3, 100), (0, 16), (512, 768), (300, 4096), (50, 14336), (3, 65536)]]
NORMS += [(s, dtype) for s in [(37, 257), (200, 8192)] for dtype in (torch.float32, torch.float16)]
GATED = [(s, torch.bfloat16) for s in GATED_AWKWARD] + [((129, 14336), torch.float16), ((7, 33), torch.float32)]
ROPES = [(s, torch.bfloat16) for s in [*ROPE_AWKWARD, (2, 32, 8, 130, 128)]] + [((1, 64, 8, 33, 256), torch.float32)]


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    got, want = got.detach().double(), want.detach()
    return float((got - want).norm() / want.norm().clamp_min(1e-30)) if want.numel() else 0.0


def compare(fn, definition, leaves, others=()) -> None:
    """Compare outputs and gradients of `fn` with the definition in fp64."""
    junk = torch.full((1 << 20,), float("nan"), device="cuda")  # what is not written shows
    del junk
    dtype = leaves[0].dtype
    got = [x.detach().requires_grad_() for x in leaves]
    want = [x.detach().double().requires_grad_() for x in leaves]
    outputs, wanted = fn(*got, *others), definition(*want, *[o.double() for o in others])
    outputs, wanted = (o if isinstance(o, tuple) else (o,) for o in (outputs, wanted))
    grads = [torch.randn_like(o.detach()) for o in outputs]
    results = [*outputs, *torch.autograd.grad(outputs, got, grads)]
    truth = [*wanted, *torch.autograd.grad(wanted, want, [g.double() for g in grads])]
    for a, b in zip(results, truth, strict=True):
        assert a.dtype == dtype
        assert error(a, b) < ROUNDING[dtype]


@pytest.mark.parametrize(("shape", "dtype"), NORMS)
def test_rms_norm(shape, dtype) -> None:
    torch.manual_seed(0)
    x, residual, weight = random(*shape, dtype=dtype), random(*shape, dtype=dtype), random(shape[-1], dtype=dtype)
    compare(lambda *a: rms_norm(*a, 1e-5, impl="triton"), lambda *a: rms_norm(*a, 1e-5, impl="reference"), (x, weight))
    fused, definition = (
        lambda x, w, r, impl=impl: rms_norm(x, w, 1e-5, r, weight_offset=1.0, impl=impl)
        for impl in ("triton", "reference")
    )
    if dtype is torch.float32:  # the rounded sum is the definition's own in fp32 only
        compare(fused, definition, (x, weight, residual))


@pytest.mark.parametrize(("shape", "dtype"), NORMS)
def test_layer_norm(shape, dtype) -> None:
    torch.manual_seed(0)
    x, residual = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
    weight, bias = random(shape[-1], dtype=dtype), random(shape[-1], dtype=dtype)
    fused, definition = (
        lambda x, w, b, impl=impl: layer_norm(x, w, b, 1e-3, impl=impl) for impl in ("triton", "reference")
    )
    compare(fused, definition, (x, weight, bias))
    fused, definition = (
        lambda x, w, r, impl=impl: layer_norm(x, w, None, 1e-3, r, impl=impl) for impl in ("triton", "reference")
    )
    if dtype is torch.float32:
        compare(fused, definition, (x, weight, residual))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "dtype"), GATED)
def test_gated_mlp(shape, activation, dtype) -> None:
    torch.manual_seed(0)
    gate, up = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
    fused, definition = (lambda g, u, i=i: gated_mlp(g, u, activation, impl=i) for i in ("triton", "reference"))
    compare(fused, definition, (gate, up))
    compare(fused, definition, random(5, 2 * shape[-1], dtype=dtype).chunk(2, -1))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(("shape", "dtype"), ROPES)
def test_rope(shape, layout, interleaved, dtype) -> None:
    torch.manual_seed(0)
    batch, q_heads, k_heads, positions, d = shape
    q, k = (random(batch, positions, heads, d, dtype=dtype) for heads in (q_heads, k_heads))
    if layout == "bhsd":
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    turns = torch.outer(torch.arange(positions), 1.0 / 1e4 ** (torch.arange(0, d, 2) / d)).cuda()
    fused, definition = (
        lambda q, k, c, s, impl=impl: rope(q, k, c, s, layout=layout, interleaved=interleaved, impl=impl)
        for impl in ("triton", "reference")
    )
    compare(fused, definition, (q, k), (turns.cos(), turns.sin()))


def test_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of memory")
    rows, columns = (1 << 31) // 4096 + 8, 4096
    x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(columns, device="cuda", dtype=torch.bfloat16)
    assert error(rms_norm(x, weight, impl="triton")[-64:], rms_norm(x[-64:].double(), weight.double())) < 6e-3
    assert error(gated_mlp(x, x, impl="triton")[-64:], gated_mlp(x[-64:].double(), x[-64:].double())) < 6e-3


@pytest.mark.parametrize("columns", [768, 4096, 14336])
def test_gradients_of_weights_are_the_same_in_every_run(columns) -> None:
    x, weight = random(5000, columns, dtype=torch.bfloat16), random(columns, dtype=torch.bfloat16)
    for norm in (rms_norm, layer_norm):
        runs = []
        for _ in range(5):
            leaf = weight.clone().requires_grad_()
            norm(x, leaf, impl="triton").backward(x)
            runs.append(leaf.grad)
        assert all(torch.equal(runs[0], other) for other in runs)


def test_the_order_of_hugging_face_to_the_bit() -> None:
    x, weight = random(1000, 4096, dtype=torch.bfloat16), random(4096, dtype=torch.bfloat16)
    for options in ({"round_before_weight": True}, {}, {"weight_offset": 1.0}):
        got, want = (rms_norm(x, weight, impl=impl, **options) for impl in ("triton", "reference"))
        assert (got != want).float().mean() < 0.02  # the order of summation moves a few by one unit


@pytest.mark.slow
def test_compiled_around_the_kernels() -> None:
    """The operators trace into one graph, with their gradients."""

    def block(x, weight, gate):
        h = rms_norm(x, weight, impl="triton")
        return gated_mlp(h * 2, gate, impl="triton") + layer_norm(x, weight, impl="triton")

    x, weight, gate = random(64, 256, dtype=torch.float32), random(256, dtype=torch.float32), torch.randn(64, 256)
    gate = gate.cuda()
    leaves = [t.clone().requires_grad_() for t in (x, weight, gate)]
    others = [t.clone().requires_grad_() for t in (x, weight, gate)]
    torch.compile(block, fullgraph=True)(*leaves).square().sum().backward()
    block(*others).square().sum().backward()
    for a, b in zip(leaves, others, strict=True):
        assert error(a.grad, b.grad.double()) < 1e-5


def test_launches_go_to_the_tensors_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, weight = torch.randn(4, 64, device="cuda:1"), torch.randn(64, device="cuda:1")
    assert torch.allclose(rms_norm(x, weight, impl="triton"), F.rms_norm(x, (64,), weight, 1e-6), atol=1e-5)
