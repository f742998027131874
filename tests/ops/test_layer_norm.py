"""LayerNorm: the definition, what the API refuses, and under the interpreter the kernels against fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kernel_pytorch.core.types import Skip
from kernel_pytorch.errors import InputsError
from kernel_pytorch.ops.layer_norm import layer_norm, unsupported
from kernel_pytorch.ops.layer_norm.shapes import AWKWARD

from .conftest import run_interpreted

# The interpreter rounds to bfloat16 towards zero; tests/gpu/test_ops.py has the real bound.
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-2}

WITH = [(True, False), (False, True), (True, True)]
"""A bias, a residual."""
LONG = dict(zip([shape for shape in AWKWARD if shape[-1] > 4096], WITH, strict=True))
"""Rows that take the interpreter seconds: one combination each."""
CASES = [
    (shape, dtype, *which)
    for shape, dtype in [(shape, torch.float32) for shape in AWKWARD]
    + [(shape, dtype) for shape in ((5, 33), (2, 3, 100)) for dtype in (torch.float16, torch.bfloat16)]
    for which in ([LONG[shape]] if shape in LONG else WITH)
]


def test_kernels_under_the_interpreter() -> None:
    run_interpreted(__file__)


def test_the_definition_is_that_of_pytorch() -> None:
    x, weight, bias = torch.randn(3, 5, 16).double(), torch.randn(16).double(), torch.randn(16).double()
    for shift in (bias, None):
        assert torch.allclose(layer_norm(x, weight, shift), F.layer_norm(x, (16,), weight, shift), rtol=1e-10)
    y, h = layer_norm(x, weight, bias, 1e-5, x)
    assert torch.equal(h, x + x)
    assert torch.allclose(y, F.layer_norm(x + x, (16,), weight, bias), rtol=1e-10)


def test_the_definition_is_differentiable() -> None:
    x, residual = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, w, b, r: layer_norm(x, w, b, 1e-3, r), (x, weight, bias, residual))


def test_a_named_implementation_does_not_fall_back() -> None:
    x, weight = torch.randn(2, 8), torch.ones(8)
    assert isinstance(unsupported(x, weight), Skip)
    with pytest.raises(InputsError, match="Triton"):
        layer_norm(x, weight, impl="triton")
    with pytest.raises(InputsError, match="unknown impl"):
        layer_norm(x, weight, impl="cuda")  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("x", "weight", "bias", "residual", "words"),
    [
        (torch.ones(2, 8), torch.ones(4), None, None, "weight must be"),
        (torch.ones(2, 8), torch.ones(8), torch.ones(4), None, "bias must be like weight"),
        (torch.ones(2, 8), torch.ones(8), torch.ones(8).half(), None, "bias must be like weight"),
        (torch.ones(2, 0), torch.ones(0), None, None, "n > 0"),
        (torch.ones(2, 8), torch.ones(8), None, torch.ones(2, 4), "residual must be like x"),
    ],
)
def test_what_does_not_fit_is_told(x, weight, bias, residual, words) -> None:
    with pytest.raises(InputsError, match=words):
        layer_norm(x, weight, bias, 1e-6, residual)


def oracle(x, weight, bias, residual, dy, dh):
    """Return outputs and gradients in fp64."""
    tensors = (x, weight, bias, residual)
    leaves = [None if t is None else t.double().requires_grad_() for t in tensors]
    h = leaves[0]
    if residual is not None:  # as the kernel does: the sum is rounded, and its gradient passes
        h = h + leaves[3]
        h = h + ((x + residual).double() - h).detach()
    y = F.layer_norm(h, h.shape[-1:], leaves[1], leaves[2], 1e-5)
    loss = (y * dy.double()).sum() + ((h * dh.double()).sum() if residual is not None else 0)
    return [y, h], torch.autograd.grad(loss, [t for t in leaves if t is not None])


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    got, want = got.detach().double(), want.detach()
    return float((got - want).norm() / want.norm().clamp_min(1e-30)) if want.numel() else 0.0


@pytest.mark.parametrize(("shape", "dtype", "with_bias", "with_residual"), CASES)
def test_forward_and_backward(interpreter, shape, dtype, with_bias, with_residual) -> None:
    torch.manual_seed(sum(shape))
    x, residual, dy, dh = (torch.randn(shape).to(dtype) for _ in range(4))
    weight, bias = ((torch.randn(shape[-1]) + 0.5).to(dtype) for _ in range(2))
    x = x + 3.0
    residual, bias = residual if with_residual else None, bias if with_bias else None
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias, residual)]
    outputs = layer_norm(*leaves[:3], 1e-5, leaves[3], impl="triton")
    outputs = outputs if with_residual else (outputs,)
    grads = torch.autograd.grad(outputs, [t for t in leaves if t is not None], (dy, dh)[: len(outputs)])
    wanted, wanted_grads = oracle(x, weight, bias, residual, dy, dh)
    for got, want in zip([*outputs, *grads], [*wanted[: len(outputs)], *wanted_grads], strict=True):
        assert got.dtype == dtype
        assert error(got, want) < ROUNDING[dtype]


def test_a_large_mean_does_not_cancel(interpreter) -> None:
    x, weight = torch.randn(4, 256) + 1e3, torch.ones(256)
    assert error(layer_norm(x, weight, impl="triton"), layer_norm(x.double(), weight.double())) < 1e-4


def test_strides_and_gradients_that_are_expanded(interpreter) -> None:
    wide, weight, bias = torch.randn(6, 5, 48), torch.randn(32), torch.randn(32)
    for x in (wide[:, :, :32], wide.transpose(0, 1)[:, :, 3:35], torch.randn(32, 6).t(), torch.randn(32).expand(4, 32)):
        leaf, other = x.detach().requires_grad_(), x.detach().double().requires_grad_()
        y = layer_norm(leaf, weight, bias, impl="triton")
        y.sum().backward()
        layer_norm(other, weight.double(), bias.double()).sum().backward()
        assert error(y, layer_norm(x.double(), weight.double(), bias.double())) < 1e-6
        assert error(leaf.grad, other.grad) < 1e-5


def test_the_operator_is_registered_as_pytorch_wants(interpreter) -> None:
    x, residual = (torch.randn(4, 16, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(16, requires_grad=True) for _ in range(2))
    ops = torch.ops.kernel_pytorch
    torch.library.opcheck(ops.layer_norm.default, (x, weight, bias, 1e-6))
    torch.library.opcheck(ops.add_layer_norm.default, (x, residual, weight, None, 1e-6))
