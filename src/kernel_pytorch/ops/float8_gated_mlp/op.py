# mypy: disable-error-code="untyped-decorator"
# ruff: noqa: FBT001, PLR0917
"""Gated activations in FP8 as operators of PyTorch; what they do with states is as in `float8_cast/op.py`."""

from __future__ import annotations

import torch

from kernel_pytorch._triton.launch import INTERPRETED
from kernel_pytorch.ops.float8_cast.layout import padded
from kernel_pytorch.ops.float8_cast.op import moves_scale

__all__ = ["float8_gated_mlp_backward_op", "float8_gated_mlp_op"]

torch.library.define(
    "kernel_pytorch::float8_gated_mlp",
    "(Tensor gate_up, Tensor? state, ScalarType dtype, str activation, str role, bool power_of_2) -> (Tensor, Tensor)",
)
torch.library.define(
    "kernel_pytorch::float8_gated_mlp_backward",
    "(Tensor grad, Tensor gate_up, Tensor? state, Tensor product_inverse, ScalarType dtype, ScalarType product_dtype,"
    " str activation, bool row, bool transposed, bool again, bool power_of_2) -> (Tensor, Tensor, Tensor, Tensor)",
)


def _forward(
    gate_up: torch.Tensor,
    state: torch.Tensor | None,
    dtype: torch.dtype,
    activation: str,
    role: str,
    power_of_2: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    counts, moves = role != "read", moves_scale(role)
    if gate_up.is_cuda or INTERPRETED:
        from kernel_pytorch.ops.float8_gated_mlp import float8_gated_mlp_kernel as kernel

        return kernel.forward(gate_up, state, dtype, activation, update=counts, roll=moves, power_of_2=power_of_2)
    from kernel_pytorch.ops.float8_gated_mlp.reference import forward_reference

    return forward_reference(gate_up, state, dtype, activation, update=counts, roll=moves, power_of_2=power_of_2)


def _backward(
    grad: torch.Tensor,
    gate_up: torch.Tensor,
    state: torch.Tensor | None,
    product_inverse: torch.Tensor,
    dtype: torch.dtype,
    product_dtype: torch.dtype,
    activation: str,
    row: bool,
    transposed: bool,
    again: bool,
    power_of_2: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dtypes = (dtype, product_dtype)
    if grad.is_cuda or INTERPRETED:
        from kernel_pytorch.ops.float8_gated_mlp import float8_gated_mlp_kernel as kernel

        return kernel.backward(
            grad, gate_up, state, product_inverse, dtypes, activation, row=row, transposed=transposed, again=again,
            power_of_2=power_of_2,
        )  # fmt: skip
    from kernel_pytorch.ops.float8_gated_mlp.reference import backward_reference

    return backward_reference(
        grad, gate_up, state, product_inverse, dtypes, activation, row=row, transposed=transposed, again=again,
        power_of_2=power_of_2,
    )  # fmt: skip


for _kind in ("cuda", "cpu"):
    torch.library.impl("kernel_pytorch::float8_gated_mlp", _kind)(_forward)
    torch.library.impl("kernel_pytorch::float8_gated_mlp_backward", _kind)(_backward)


@torch.library.register_fake("kernel_pytorch::float8_gated_mlp")
def _forward_fake(
    gate_up: torch.Tensor,
    state: torch.Tensor | None,
    dtype: torch.dtype,
    activation: str,
    role: str,
    power_of_2: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    del state, activation, role, power_of_2
    out = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2), dtype=dtype)
    return out, gate_up.new_empty((1,), dtype=torch.float32)


@torch.library.register_fake("kernel_pytorch::float8_gated_mlp_backward")
def _backward_fake(
    grad: torch.Tensor,
    gate_up: torch.Tensor,
    state: torch.Tensor | None,
    product_inverse: torch.Tensor,
    dtype: torch.dtype,
    product_dtype: torch.dtype,
    activation: str,
    row: bool,
    transposed: bool,
    again: bool,
    power_of_2: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    del gate_up, state, product_inverse, activation, power_of_2
    rows, columns = grad.shape
    return (
        grad.new_empty((rows, 2 * columns) if row else (0,), dtype=dtype),
        grad.new_empty((2 * columns, padded(rows)) if transposed else (0,), dtype=dtype),
        grad.new_empty((1,), dtype=torch.float32),
        grad.new_empty((columns, padded(rows)) if again else (0,), dtype=product_dtype),
    )


float8_gated_mlp_op = torch.ops.kernel_pytorch.float8_gated_mlp
"""`(gate_up, state, dtype, activation, role, power_of_2) -> (row, inverse)`: `activation(gate) * up` in FP8.

`gate_up` is `[rows, 2 n]`, gates in the first `n` columns; the result is `[rows, n]`. State, role and `power_of_2` as
of `float8_cast_op`. There is no gradient of its own.
"""
float8_gated_mlp_backward_op = torch.ops.kernel_pytorch.float8_gated_mlp_backward
"""The gradient of `gate_up` in FP8, and the product transposed, from the gradient `grad` `[rows, n]` of the product.

Returns FP8 `[rows, 2 n]`, FP8 `[2 n, padded(rows)]`, float32 `[1]` that turns both back, and the product itself in
`product_dtype`, `[n, padded(rows)]`, at the scale `1 / product_inverse` that the forward had: it is computed again in
place of being kept. What is not wanted (`row`, `transposed`, `again`) is empty.
"""
