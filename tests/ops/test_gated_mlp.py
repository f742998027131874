"""The gated activations: the definition, what the API refuses, and under the interpreter the kernels against fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kernel_pytorch.core.types import Skip
from kernel_pytorch.errors import InputsError
from kernel_pytorch.ops.gated_mlp import gated_mlp, geglu, swiglu, unsupported
from kernel_pytorch.ops.gated_mlp.reference import ACTIVATIONS
from kernel_pytorch.ops.gated_mlp.shapes import AWKWARD

from .conftest import run_interpreted

# The interpreter rounds to bfloat16 towards zero.
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}


def test_kernels_under_the_interpreter() -> None:
    run_interpreted(__file__)


def test_the_definition_is_that_of_pytorch() -> None:
    gate, up = torch.randn(4, 9).double(), torch.randn(4, 9).double()
    assert torch.allclose(swiglu(gate, up), F.silu(gate) * up, rtol=1e-14)
    assert torch.allclose(geglu(gate, up), F.gelu(gate) * up, rtol=1e-14)
    assert torch.allclose(geglu(gate, up, "tanh"), F.gelu(gate, approximate="tanh") * up, rtol=1e-14)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_definition_is_differentiable(activation) -> None:
    leaves = tuple(torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: gated_mlp(g, u, activation), leaves)


def test_what_does_not_fit_is_told() -> None:
    x = torch.ones(2, 3)
    assert isinstance(unsupported(x, x), Skip)
    assert "float64" in unsupported(x.double(), x.double()).reason
    for call, words in (
        (lambda: swiglu(x, torch.ones(3, 2)), "must be alike"),
        (lambda: swiglu(x, x.half()), "must be alike"),
        (lambda: gated_mlp(x, x, "relu"), "unknown activation"),
        (lambda: geglu(x, x, "erf"), "approximate must be"),
        (lambda: swiglu(x, x, impl="triton"), "Triton"),
        (lambda: swiglu(x, x, impl="cuda"), "unknown impl"),
    ):
        with pytest.raises(InputsError, match=words):
            call()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    got, want = got.detach().double(), want.detach()
    return float((got - want).norm() / want.norm().clamp_min(1e-30)) if want.numel() else 0.0


def compare(gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor, activation: str) -> None:
    leaves = [t.detach().requires_grad_() for t in (gate, up)]
    exact = [t.detach().double().requires_grad_() for t in (gate, up)]
    out, want = gated_mlp(*leaves, activation, impl="triton"), gated_mlp(*exact, activation)
    grads, wanted = torch.autograd.grad(out, leaves, grad), torch.autograd.grad(want, exact, grad.double())
    for got, expected in zip([out, *grads], [want, *wanted], strict=True):
        assert got.dtype == gate.dtype
        assert error(got, expected) < ROUNDING[gate.dtype]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", AWKWARD)
def test_forward_and_backward(interpreter, shape, activation, dtype) -> None:
    torch.manual_seed(sum(shape))
    gate, up, grad = (torch.randn(shape).to(dtype) for _ in range(3))
    compare(2 * gate, up, grad, activation)


def test_strides(interpreter) -> None:
    fused = torch.randn(3, 5, 80)
    compare(*fused.chunk(2, -1), torch.randn(3, 5, 40), "silu")
    compare(fused[:, :, ::2], fused[:, :, 1::2], torch.randn(3, 5, 40), "silu")
    compare(torch.randn(7, 6).t(), torch.randn(6, 7), torch.ones(()).expand(6, 7), "gelu")


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_inputs_stay_finite(interpreter, activation) -> None:
    gate = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4])
    compare(gate, torch.ones(7), torch.ones(7), activation)


def test_the_operator_is_registered_as_pytorch_wants(interpreter) -> None:
    leaves = tuple(torch.randn(4, 16, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.kernel_pytorch.gated_mlp.default, (*leaves, "silu"))
