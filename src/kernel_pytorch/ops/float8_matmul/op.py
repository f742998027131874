# mypy: disable-error-code="untyped-decorator"
# ruff: noqa: FBT001, FBT002, PLR0917
"""The product of FP8 matrices as an operator of PyTorch: the tensor cores' on a GPU, an emulation on a CPU."""

from __future__ import annotations

import torch

__all__ = ["float8_matmul_op"]

torch.library.define(
    "kernel_pytorch::float8_matmul",
    "(Tensor a, Tensor b, Tensor inverse_a, Tensor inverse_b, Tensor? bias, ScalarType dtype, bool fast, "
    "bool measured=False) -> Tensor",
)


@torch.library.impl("kernel_pytorch::float8_matmul", "cuda")
def _multiply(
    a: torch.Tensor,
    b: torch.Tensor,
    inverse_a: torch.Tensor,
    inverse_b: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    fast: bool,
    measured: bool = False,
) -> torch.Tensor:
    if not a.numel() or not b.numel():
        return _empty_product(a, b, bias, dtype)
    by_row = inverse_a.dim() == 2
    if by_row and dtype is not torch.bfloat16:
        # PyTorch's kernel for scales by row writes bfloat16 only.
        narrow = _multiply_by_row(a, b, inverse_a, inverse_b, None, fast).to(dtype)
        return narrow if bias is None else narrow + bias
    if by_row:
        return _multiply_by_row(a, b, inverse_a, inverse_b, bias, fast)
    if measured and bias is None:
        from kernel_pytorch.ops.linear.choice import multiply_float8

        return multiply_float8(a, b, inverse_a, inverse_b, dtype=dtype, fast=fast)
    return torch._scaled_mm(  # noqa: SLF001  # PyTorch's only entry to cuBLASLt's products of FP8
        a, b.t(), scale_a=inverse_a, scale_b=inverse_b, bias=bias, out_dtype=dtype, use_fast_accum=fast
    )


def _multiply_by_row(
    a: torch.Tensor,
    b: torch.Tensor,
    inverse_a: torch.Tensor,
    inverse_b: torch.Tensor,
    bias: torch.Tensor | None,
    fast: bool,
) -> torch.Tensor:
    # Row scales of the second operand belong to the columns of the result.
    return torch._scaled_mm(  # noqa: SLF001
        a, b.t(), scale_a=inverse_a, scale_b=inverse_b.reshape(1, -1), bias=bias, out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )  # fmt: skip


@torch.library.impl("kernel_pytorch::float8_matmul", "cpu")
def _emulate(
    a: torch.Tensor,
    b: torch.Tensor,
    inverse_a: torch.Tensor,
    inverse_b: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    fast: bool,
    measured: bool = False,
) -> torch.Tensor:
    del fast, measured
    if not a.numel() or not b.numel():
        return _empty_product(a, b, bias, dtype)
    from kernel_pytorch.ops.float8_matmul.reference import product_reference

    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return product_reference(a, b, inverse_a, inverse_b, bias, accumulate=wide).to(dtype)


def _empty_product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    out = a.new_zeros((a.shape[0], b.shape[0]), dtype=dtype)
    return out if bias is None else out + bias.to(dtype)


@torch.library.register_fake("kernel_pytorch::float8_matmul")
def _product_fake(
    a: torch.Tensor,
    b: torch.Tensor,
    inverse_a: torch.Tensor,
    inverse_b: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    fast: bool,
    measured: bool = False,
) -> torch.Tensor:
    del inverse_a, inverse_b, bias, fast, measured
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


float8_matmul_op = torch.ops.kernel_pytorch.float8_matmul
"""`(a, b, inverse_a, inverse_b, bias, dtype, fast, measured=False) -> out`; see `api.float8_matmul`.

Args of the operator beside those:
    measured: Let the measured algorithm of cuBLASLt compute it (`ops.linear.choice`), where there are no biases and no
        scales by row.
"""
