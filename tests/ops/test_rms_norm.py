"""RMSNorm: the definition, what the API refuses, and under the interpreter the kernels against fp64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from kernel_pytorch._triton.launch import as_rows, looping_launch
from kernel_pytorch.core.types import Skip
from kernel_pytorch.errors import InputsError
from kernel_pytorch.ops.rms_norm import rms_norm, unsupported
from kernel_pytorch.ops.rms_norm.shapes import AWKWARD

from .conftest import run_interpreted

ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

LONG = {(4, 9001): True, (2, 17001): False}
"""Rows that take the interpreter seconds: once each, with a residual or without."""
CASES = [
    (shape, dtype, with_residual)
    for shape, dtype in [(shape, torch.float32) for shape in AWKWARD]
    + [(shape, dtype) for shape in ((5, 33), (2, 3, 100)) for dtype in (torch.float16, torch.bfloat16)]
    for with_residual in ([LONG[shape]] if shape in LONG else [False, True])
]


def test_kernels_under_the_interpreter() -> None:
    run_interpreted(__file__)


def test_without_triton_the_reason_is_told() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from kernel_pytorch.ops import gated_mlp, layer_norm, rms_norm, rope\n"
        "x, w = torch.ones(2, 8), torch.ones(8)\n"
        "print(rms_norm.rms_norm(x, w).shape, rms_norm.unsupported(x, w))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 8]) Skip(reason='triton is not installed'" in done.stdout


def test_the_definition_is_that_of_pytorch() -> None:
    x, layer = torch.randn(3, 5, 16, dtype=torch.float64), nn.RMSNorm(16, eps=1e-5, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    assert torch.allclose(rms_norm(x, layer.weight, 1e-5), layer(x), rtol=1e-12)


def test_the_definition_rounds_in_the_order_of_hugging_face() -> None:
    x, weight = torch.randn(64, 32).bfloat16(), torch.randn(32).bfloat16()
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(rms_norm(x, weight, round_before_weight=True), weight * normalised.to(x.dtype))
    assert torch.equal(rms_norm(x, weight), (normalised * weight.float()).to(x.dtype))
    assert not torch.equal(rms_norm(x, weight), rms_norm(x, weight, round_before_weight=True))
    gemma = (normalised * (1.0 + weight.float())).to(x.dtype)
    assert torch.equal(rms_norm(x, weight, weight_offset=1.0), gemma)


def test_the_definition_is_differentiable() -> None:
    x, residual = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w, r: rms_norm(x, w, 1e-3, r, weight_offset=0.5), (x, weight, residual))


def test_a_named_implementation_does_not_fall_back() -> None:
    x, weight = torch.randn(2, 8), torch.ones(8)
    reason = unsupported(x, weight)
    assert isinstance(reason, Skip)
    with pytest.raises(InputsError, match="Triton"):
        rms_norm(x, weight, impl="triton")
    with pytest.raises(InputsError, match="unknown impl"):
        rms_norm(x, weight, impl="cuda")  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("x", "weight", "residual", "words"),
    [
        (torch.ones(2, 8), torch.ones(4), None, "weight must be"),
        (torch.ones(2, 0), torch.ones(0), None, "n > 0"),
        (torch.ones(2, 8), torch.ones(8), torch.ones(2, 4), "residual must be like x"),
        (torch.ones(2, 8), torch.ones(8), torch.ones(2, 8).half(), "residual must be like x"),
    ],
)
def test_what_does_not_fit_is_told(x, weight, residual, words) -> None:
    with pytest.raises(InputsError, match=words):
        rms_norm(x, weight, 1e-6, residual)


def test_what_the_kernel_does_not_take_is_told() -> None:
    assert "float64" in unsupported(torch.ones(2, 8).double(), torch.ones(8)).reason
    assert "registers" in unsupported(torch.ones(1, 65537), torch.ones(65537)).reason


def test_rows_are_views_where_strides_allow() -> None:
    x = torch.randn(4, 6, 8)
    assert as_rows(x).data_ptr() == x.data_ptr()
    assert as_rows(x[:, :, :4]).stride() == (8, 1)
    assert as_rows(x.transpose(1, 2)).is_contiguous()
    assert as_rows(torch.empty(0, 8)).shape == (0, 8)
    assert as_rows(torch.ones(()).expand(3, 5)).stride() == (5, 1)


@pytest.mark.parametrize("shared", [227 << 10, 99 << 10, 64 << 10, 1])
@pytest.mark.parametrize("columns", [1, 64, 768, 4096, 5120, 8192, 14336, 65536])
def test_what_is_in_flight_fits_in_shared_memory(columns, shared) -> None:
    launch = looping_launch(columns, 12, shared)
    tile = launch.rows * 12 * (1 << (columns - 1).bit_length())
    assert 1 <= launch.stages <= 4
    assert launch.per_multiprocessor * (launch.stages - 1) * tile < shared
    flying = launch.per_multiprocessor * (launch.stages - 1) * launch.rows * 12 * columns
    full = launch.per_multiprocessor * (launch.stages * tile + 2048) > shared
    assert launch.stages == 4 or full or (launch.stages == 3 and flying >= 60_000)
    assert launch.warps * launch.per_multiprocessor <= 32


def oracle(x, weight, residual, dy, dh, eps, offset):
    """Return outputs and gradients in fp64."""
    leaves = [t.double().requires_grad_() for t in (x, weight)] + (
        [residual.double().requires_grad_()] if residual is not None else []
    )
    h = leaves[0] + leaves[2] if residual is not None else leaves[0]
    if residual is not None:  # as the kernel does: the sum is rounded, and its gradient passes
        h = h + ((x + residual).double() - h).detach()
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * (leaves[1] + offset)
    loss = (y * dy.double()).sum() + ((h * dh.double()).sum() if residual is not None else 0)
    return [y, h], torch.autograd.grad(loss, leaves)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    got, want = got.detach(), want.detach()
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30)) if want.numel() else 0.0


def test_launches_are_those_that_were_fastest_on_an_h200() -> None:
    """In bfloat16 without a residual; the times are beside the rules."""
    fastest = {768: (2, 4, 4, 4), 4096: (1, 8, 2, 3), 5120: (1, 8, 1, 4), 8192: (1, 16, 1, 3), 14336: (1, 16, 1, 3)}
    for columns, wanted in fastest.items():
        launch = looping_launch(columns, 4, 227 << 10)
        assert (launch.rows, launch.warps, launch.per_multiprocessor, launch.stages) == wanted


@pytest.mark.parametrize(("shape", "dtype", "with_residual"), CASES)
def test_forward_and_backward(interpreter, shape, dtype, with_residual) -> None:
    torch.manual_seed(sum(shape))
    x, residual, dy, dh = (torch.randn(shape).to(dtype) for _ in range(4))
    weight = (torch.randn(shape[-1]) + 0.5).to(dtype)
    residual = residual if with_residual else None
    leaves = [t.clone().requires_grad_() for t in (x, weight, residual) if t is not None]
    args = (leaves[0], leaves[1], 1e-5, *leaves[2:])
    outputs = rms_norm(*args, weight_offset=0.25, impl="triton")
    outputs = outputs if with_residual else (outputs,)
    grads = torch.autograd.grad(outputs, leaves, (dy, dh)[: len(outputs)])
    wanted, wanted_grads = oracle(x, weight, residual, dy, dh, 1e-5, 0.25)
    for got, want in zip([*outputs, *grads], [*wanted[: len(outputs)], *wanted_grads], strict=True):
        assert got.dtype == dtype
        assert error(got, want) < ROUNDING[dtype]


def test_strides_and_gradients_that_are_expanded(interpreter) -> None:
    wide = torch.randn(6, 5, 48)
    weight = torch.randn(32)
    for x in (
        wide[:, :, :32],
        wide[:, :, 1:33],
        wide.transpose(0, 1)[:, :, :32],
        torch.randn(32, 6).t(),
        torch.randn(32).expand(4, 32),
    ):
        leaf = x.detach().requires_grad_()
        y = rms_norm(leaf, weight, impl="triton")
        y.sum().backward()
        assert error(y, rms_norm(x.double(), weight.double())) < 1e-6
        other = x.detach().double().requires_grad_()
        rms_norm(other, weight.double()).sum().backward()
        assert error(leaf.grad, other.grad) < 1e-5


def test_the_order_of_hugging_face_to_the_bit(interpreter) -> None:
    # In float16: the interpreter rounds to bfloat16 towards zero. tests/gpu/test_ops.py has bfloat16.
    x, weight = torch.randn(33, 64).half(), torch.randn(64).half()
    for kwargs in ({"round_before_weight": True}, {}, {"weight_offset": 1.0}):
        got, want = rms_norm(x, weight, impl="triton", **kwargs), rms_norm(x, weight, impl="reference", **kwargs)
        assert (got != want).float().mean() < 0.02  # the order of summation moves a few by one unit
    mixed = rms_norm(x, weight.float(), round_before_weight=True, impl="triton")
    assert mixed.dtype == torch.float32
    assert error(mixed, rms_norm(x, weight.float(), round_before_weight=True, impl="reference").double()) < 1e-3


def test_one_output_unused(interpreter) -> None:
    x, residual, weight = torch.randn(4, 16), torch.randn(4, 16), torch.randn(16)
    for index in (0, 1):
        got, want = (t.clone().requires_grad_() for t in (x, x))
        rms_norm(got, weight, 1e-6, residual, impl="triton")[index].square().sum().backward()
        rms_norm(want, weight, 1e-6, residual, impl="reference")[index].square().sum().backward()
        assert torch.allclose(got.grad, want.grad, atol=1e-5)


def test_the_gradient_of_the_weight_is_the_same_in_every_run(interpreter) -> None:
    x, weight = torch.randn(100, 40), torch.randn(40)
    runs = []
    for _ in range(3):
        leaf = weight.clone().requires_grad_()
        rms_norm(x, leaf, impl="triton").square().sum().backward()
        runs.append(leaf.grad)
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_the_operator_is_registered_as_pytorch_wants(interpreter) -> None:
    x, residual = (torch.randn(4, 16, requires_grad=True) for _ in range(2))
    weight = torch.randn(16, requires_grad=True)
    ops = torch.ops.kernel_pytorch
    torch.library.opcheck(ops.rms_norm.default, (x, weight, 1e-6, 0.0, False))
    torch.library.opcheck(ops.add_rms_norm.default, (x, residual, weight, 1e-6, 0.0, True))
