"""Rotary embedding: the definition, what the API refuses, and under the interpreter the kernel against fp64."""

from __future__ import annotations

import pytest
import torch

from kernel_pytorch.core.types import Skip
from kernel_pytorch.errors import InputsError
from kernel_pytorch.ops.rope import rope, unsupported
from kernel_pytorch.ops.rope.shapes import AWKWARD

from .conftest import run_interpreted

# The interpreter rounds to bfloat16 towards zero.
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def test_kernels_under_the_interpreter() -> None:
    run_interpreted(__file__)


def angles(positions: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    turns = torch.outer(torch.arange(positions), 1.0 / 1e4 ** (torch.arange(0, d, 2) / d))
    return turns.cos(), turns.sin()


def test_the_definition_is_that_of_hugging_face() -> None:
    q, k = torch.randn(2, 4, 6, 16).double(), torch.randn(2, 2, 6, 16).double()
    cos, sin = (t.double() for t in angles(6, 16))
    full_cos, full_sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    for angle in (full_cos, full_sin):
        angle += torch.linspace(0, 1, 16)  # halves of their own are allowed where angles are d wide

    def rotate_half(x: torch.Tensor) -> torch.Tensor:
        return torch.cat((-x[..., 8:], x[..., :8]), -1)

    for x, got in zip((q, k), rope(q, k, full_cos, full_sin), strict=True):
        assert torch.allclose(got, x * full_cos + rotate_half(x) * full_sin, rtol=1e-14)
    complex_q = torch.view_as_complex(q.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    assert torch.allclose(rope(q, k, cos, sin, interleaved=True)[0], torch.view_as_real(complex_q).flatten(-2))


def test_layouts_and_batches_of_angles_agree() -> None:
    q, k = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 6, 16)
    cos, sin = angles(6, 16)
    wanted = rope(q, k, cos, sin)
    for c, s in ((cos[None], sin[None]), (cos.expand(2, 6, 8), sin.expand(2, 6, 8))):
        got = rope(q.transpose(1, 2), k.transpose(1, 2), c, s, layout="bshd")
        assert all(torch.equal(a, b.transpose(1, 2)) for a, b in zip(wanted, got, strict=True))


def test_what_does_not_fit_is_told() -> None:
    q = torch.ones(2, 4, 6, 8)
    cos = sin = torch.ones(6, 4)
    assert isinstance(unsupported(q, q, cos, sin), Skip)
    assert "gradient of cos" in unsupported(q, q, cos.clone().requires_grad_(), sin).reason
    for call, words in (
        (lambda: rope(q, q.half(), cos, sin), "of one dtype"),
        (lambda: rope(q, q[:, :, :3], cos, sin), "alike but for their heads"),
        (lambda: rope(q[..., :7], q[..., :7], cos, sin), "even last"),
        (lambda: rope(q, q, torch.ones(6, 6), torch.ones(6, 6)), "cos and sin must be"),
        (lambda: rope(q, q, torch.ones(6, 8), torch.ones(6, 8), interleaved=True), "cos and sin must be"),
        (lambda: rope(q, q, cos, sin, layout="sbhd"), "unknown layout"),
        (lambda: rope(q, q, cos, sin, impl="triton"), "Triton"),
        (lambda: rope(q, q, cos, sin, impl="cuda"), "unknown impl"),
    ):
        with pytest.raises(InputsError, match=words):
            call()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    got, want = got.detach().double(), want.detach()
    return float((got - want).norm() / want.norm().clamp_min(1e-30)) if want.numel() else 0.0


def compare(q, k, cos, sin, **options) -> None:
    leaves = [t.detach().requires_grad_() for t in (q, k)]
    exact = [t.detach().double().requires_grad_() for t in (q, k)]
    grads = [torch.randn(t.shape).to(t.dtype) for t in (q, k)]
    out = rope(*leaves, cos, sin, impl="triton", **options)
    want = rope(*exact, cos.double(), sin.double(), impl="reference", **options)
    got = [*out, *torch.autograd.grad(out, leaves, grads)]
    wanted = [*want, *torch.autograd.grad(want, exact, [g.double() for g in grads])]
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == q.dtype
        assert error(a, b) < ROUNDING[q.dtype]


CASES = [(shape, torch.float32) for shape in AWKWARD] + [
    (shape, dtype) for shape in ((2, 3, 1, 5, 8), (1, 5, 5, 7, 80)) for dtype in (torch.float16, torch.bfloat16)
]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_forward_and_backward(interpreter, shape, layout, interleaved, dtype) -> None:
    torch.manual_seed(sum(shape))
    batch, q_heads, k_heads, positions, d = shape
    q, k = (torch.randn(batch, positions, heads, d).to(dtype) for heads in (q_heads, k_heads))
    if layout == "bhsd":
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    compare(q, k, *angles(positions, d), layout=layout, interleaved=interleaved)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_angles_of_both_halves(interpreter, layout, dtype) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(2, 5, heads, 16).to(dtype) for heads in (4, 2))
    if layout == "bhsd":
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    compare(q, k, torch.randn(2, 5, 16), torch.randn(2, 5, 16), layout=layout)


def test_strides(interpreter) -> None:
    fused = torch.randn(2, 5, 6 * 8)
    q, k = fused[..., :32].unflatten(-1, (4, 8)), fused[..., 32:].unflatten(-1, (2, 8))
    cos, sin = angles(7, 8)
    compare(q, k, cos[2:], sin[2:], layout="bshd")
    compare(q, k, torch.stack([cos[:5], cos[2:]]), torch.stack([sin[:5], sin[2:]]), layout="bshd")
    compare(torch.randn(2, 3, 8, 5).mT, torch.randn(2, 3, 8, 5).mT, cos.t().contiguous().t()[:5], sin[:5])
    hf = torch.cat([cos, cos], -1)[None, :5]
    compare(q, k, hf[..., :4], torch.cat([sin, sin], -1)[None, :5, :4], layout="bshd")


def test_outputs_keep_the_memory_order_of_the_inputs(interpreter) -> None:
    q = torch.randn(2, 5, 4, 8).transpose(1, 2)
    out, _ = rope(q, q, *angles(5, 8), impl="triton")
    assert out.stride() == q.stride()


def test_the_operator_is_registered_as_pytorch_wants(interpreter) -> None:
    q, k = torch.randn(2, 5, 4, 8, requires_grad=True), torch.randn(2, 5, 2, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.kernel_pytorch.rope.default, (q, k, *angles(5, 8), "bshd", False, False))
