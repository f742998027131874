"""What users call: `float8_cast`, and `unsupported`, which says where its kernel does not run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from kernel_pytorch._triton.launch import INTERPRETED, cannot_run
from kernel_pytorch.core.types import Skip
from kernel_pytorch.errors import InputsError
from kernel_pytorch.ops.float8_cast.layout import ALIGNED, FORMATS
from kernel_pytorch.ops.float8_cast.op import float8_cast_op, float8_cast_rows_op

__all__ = ["Float8Matrix", "Role", "float8_cast", "unsupported"]

Role = Literal["forward", "backward", "read"]
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LEAST_CAPABILITY = (8, 9)


class Float8Matrix(NamedTuple):
    """A matrix in FP8 as products take it: rows adjacent, and transposed; `row * inverse` is about the matrix.

    Attributes:
        row: `[rows, columns]`, or empty where not asked for.
        transposed: `[columns, padded(rows)]`, zero beyond `rows`, or empty.
        inverse: Float32 `[1]`, or `[rows, 1]` where each row has a scale.
        turned_inverse: The same of the transposed copy: `[1]` or `[columns, 1]`.
    """

    row: torch.Tensor
    transposed: torch.Tensor
    inverse: torch.Tensor
    turned_inverse: torch.Tensor


def unsupported(x: torch.Tensor) -> Skip | None:
    """Return why the kernel does not run on this tensor; `None` where it does."""
    if x.dtype not in _DTYPES:
        return Skip(f"the kernel takes bfloat16, float16 and float32, got {x.dtype}")
    skip = cannot_run(x)
    if skip is None and x.is_cuda and not INTERPRETED and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(x.device)
        if capability < _LEAST_CAPABILITY:
            return Skip(f"FP8 needs compute capability 8.9 or newer, this GPU has {capability[0]}.{capability[1]}")
    return skip


def float8_cast(
    x: torch.Tensor | Sequence[torch.Tensor],
    dtype: torch.dtype,
    state: torch.Tensor | None = None,
    *,
    row: bool = True,
    transposed: bool = True,
    role: Role = "forward",
    power_of_2: bool = False,
    axis: int = 0,
    by_row: bool = False,
    factors: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Float8Matrix:
    """Return a matrix in FP8, in one pass over memory where its scale is known beforehand.

    On a GPU by a kernel, on a CPU by the definition (an emulation, for tests). Values are rounded to nearest even and
    saturate; what is not finite becomes NaN. There is no gradient.

    Args:
        x: `[rows, columns]`, bfloat16, float16 or float32 (on a CPU also float64); or several, which become one.
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
        state: Of a delayed scale (`fresh_state`), written: the scale is set by the largest magnitude of the last casts.
            `None`, and where nothing is known yet, scales by the largest magnitude of `x` itself, which reads it twice.
        row: Whether the row-major copy is wanted.
        transposed: Whether the transposed copy is wanted.
        role: `read` uses the state without changing it; `forward` does not move the scale where the autograd engine
            runs, that is where a checkpoint recomputes.
        power_of_2: Round scales down to powers of two.
        axis: How several matrices become one, under one scale: 0 puts them below each other (16 divides the rows of
            each but the last), 1 side by side.
        by_row: A scale for each row by its own largest magnitude (then there is no state), and for the transposed copy
            one for each of its own rows.
        factors: Of the rows, float32 `[rows]`, and of the columns, `[columns]` in any format: what is cast is the one
            matrix times both, as an RMSNorm makes it.

    Raises:
        InputsError: Shape or dtypes do not fit.
    """
    xs = [x.detach()] if isinstance(x, torch.Tensor) else [one.detach() for one in x]
    shapes = [[*one.shape] for one in xs]
    alike = {(one.dtype, *one.shape[1 - axis : 2 - axis]) for one in xs}
    if dtype not in FORMATS.values() or len(alike) != 1 or any(len(s) != 2 for s in shapes) or axis not in (0, 1):
        raise InputsError(f"float8_cast takes matrices of one dtype and side, and an FP8 format; got {shapes}, {dtype}")
    if not xs[0].is_floating_point() or (axis == 0 and any(len(one) % ALIGNED for one in xs[:-1])):
        raise InputsError(f"float8_cast takes numbers, and stacks multiples of {ALIGNED} rows; got {shapes}")
    if factors is not None:
        sizes = [[*one.shape] for one in factors]
        if by_row or len(xs) != 1 or sizes != [[shapes[0][0]], [shapes[0][1]]]:
            raise InputsError(f"float8_cast: factors are of the rows and columns of one matrix {shapes}; got {sizes}")
    if by_row:
        if state is not None:
            raise InputsError("float8_cast: scales by row have no state")
        return Float8Matrix(*float8_cast_rows_op(xs, dtype, row, transposed, power_of_2, axis))
    given = (None, None) if factors is None else tuple(one.detach() for one in factors)
    small, turned, inverse = float8_cast_op(xs, state, dtype, row, transposed, role, power_of_2, axis, *given)
    return Float8Matrix(small, turned, inverse, inverse)
