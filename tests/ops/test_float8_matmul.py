"""Products of FP8 matrices on the CPU, where they are an emulation."""

from __future__ import annotations

import pytest
import torch

from kernel_pytorch.core.types import Skip
from kernel_pytorch.errors import InputsError
from kernel_pytorch.ops.float8_cast import E4M3, E5M2, float8_cast
from kernel_pytorch.ops.float8_matmul import emulated, float8_matmul, unsupported


@pytest.mark.parametrize("form", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_exact_on_its_operands(form, dtype) -> None:
    a, b = float8_cast(torch.randn(5, 32) * 100, form), float8_cast(torch.randn(16, 32) / 100, E4M3)
    bias = torch.randn(16, dtype=dtype)
    got = float8_matmul(a.row, b.row, a.inverse, b.inverse, bias=bias, dtype=dtype)
    want = (a.row.double() * a.inverse.double()) @ (b.row.double() * b.inverse.double()).t() + bias.double()
    assert got.dtype == dtype
    assert (got.double() - want).norm() <= 2 * torch.finfo(dtype).eps * want.norm()


def test_scales_by_row() -> None:
    a, b = float8_cast(torch.randn(5, 32), E4M3), float8_cast(torch.randn(16, 32), E4M3)
    by_row, by_column = torch.rand(5, 1), torch.rand(16, 1)
    got = float8_matmul(a.row, b.row, by_row, by_column, dtype=torch.float64)
    want = (a.row.double() * by_row) @ (b.row.double() * by_column).t()
    assert torch.allclose(got, want, rtol=1e-12)


def test_no_rows_and_nothing_to_sum_over() -> None:
    empty, b = float8_cast(torch.zeros(0, 32), E4M3), float8_cast(torch.randn(16, 32), E4M3)
    assert float8_matmul(empty.row, b.row, empty.inverse, b.inverse).shape == (0, 16)
    nothing = torch.zeros(4, 0).to(E4M3)
    one = torch.ones(1)
    assert torch.equal(float8_matmul(nothing, nothing, one, one, dtype=torch.float32), torch.zeros(4, 4))


def test_what_does_not_fit_is_told() -> None:
    a, e = torch.ones(4, 16).to(E4M3), torch.ones(4, 16).to(E5M2)
    one = torch.ones(1)
    for left, right in ((a.float(), a), (e, e), (a, a[:, :8]), (a[0], a)):
        with pytest.raises(InputsError, match="float8_matmul takes"):
            float8_matmul(left, right, one, one)
    assert isinstance(unsupported("cpu", 16, 16), Skip)
    assert "16 divides" in unsupported("cpu", 24, 16).reason
    assert emulated("cpu")


def test_the_operator_is_registered_as_pytorch_wants() -> None:
    a, one = torch.ones(4, 16).to(E4M3), torch.ones(1)
    op = torch.ops.kernel_pytorch.float8_matmul.default
    # Not its schema: that test multiplies its copies of the operands, and PyTorch has no such product of FP8.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, (a, a, one, one, None, torch.float32, True), test_utils=tests)
