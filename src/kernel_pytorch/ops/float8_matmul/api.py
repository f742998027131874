"""What users call: `float8_matmul`, `unsupported`, which says where tensor cores do not compute it, and `emulated`."""

from __future__ import annotations

import torch

from kernel_pytorch.core.types import Skip
from kernel_pytorch.errors import InputsError
from kernel_pytorch.ops.float8_cast.layout import ALIGNED, E5M2, FORMATS
from kernel_pytorch.ops.float8_matmul.op import float8_matmul_op

__all__ = ["emulated", "float8_matmul", "unsupported"]

_LEAST_CAPABILITY = (8, 9)


def unsupported(device: torch.device | str, inner: int, columns: int) -> Skip | None:
    """Return why a device does not multiply FP8 matrices of these sizes; `None` where it does.

    Args:
        device: Where the operands are.
        inner: What is summed over.
        columns: Of the result; the rows may be any number.
    """
    where = torch.device(device)
    if inner % ALIGNED or columns % ALIGNED:
        return Skip(f"products of FP8 take sizes that {ALIGNED} divides, got {inner} by {columns}")
    if where.type != "cuda":
        return Skip(f"products of FP8 are emulated on {where.type}: right, and slower than in bfloat16")
    if torch.version.hip is not None:
        return Skip("AMD's formats of FP8 are not implemented here")
    capability = torch.cuda.get_device_capability(where)
    if capability < _LEAST_CAPABILITY:
        return Skip(f"FP8 needs compute capability 8.9 or newer, this GPU has {capability[0]}.{capability[1]}")
    return None


def emulated(device: torch.device | str) -> bool:
    """Return whether products of FP8 on a device are an emulation in float32, for tests of numerics only."""
    return torch.device(device).type != "cuda"


def float8_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    inverse_a: torch.Tensor,
    inverse_b: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    fast: bool = True,
) -> torch.Tensor:
    """Return `(a * inverse_a) @ (b * inverse_b).T + bias`.

    Args:
        a: FP8 `[rows, inner]`, contiguous; 16 divides `inner`.
        b: FP8 `[columns, inner]`, contiguous; 16 divides `columns`. E5M2 at most one of both.
        inverse_a: Float32 `[1]`, or one for each row `[rows, 1]`.
        inverse_b: Float32 `[1]`, or `[columns, 1]`.
        bias: `[columns]`, of `dtype`.
        dtype: Of the result: bfloat16, float16 or float32 (on a CPU also float64).
        fast: Let the tensor cores keep sums in their own accumulators, which have fewer bits than float32
            (`use_fast_accum` of `torch._scaled_mm`).

    Raises:
        InputsError: Shapes or formats do not fit.
    """
    formats = FORMATS.values()
    if a.dtype not in formats or b.dtype not in formats or (a.dtype is E5M2 and b.dtype is E5M2):
        raise InputsError(f"float8_matmul takes two formats of FP8, at most one of them E5M2, got {a.dtype}, {b.dtype}")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise InputsError(f"float8_matmul takes [rows, inner] and [columns, inner], got {[*a.shape]} and {[*b.shape]}")
    out: torch.Tensor = float8_matmul_op(a, b, inverse_a, inverse_b, bias, dtype, fast)
    return out
