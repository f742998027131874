# mypy: disable-error-code="untyped-decorator"
# ruff: noqa: FBT001, PLR0917
"""Casts to FP8 as operators of PyTorch.

The state of a delayed scale is written without being declared as mutable. It is a statistic that only the scale
depends on; declared, AOTAutograd would copy it and refuse a second forward before the first backward.
"""

from __future__ import annotations

import torch

from kernel_pytorch._triton.launch import INTERPRETED
from kernel_pytorch.ops.float8_cast.layout import padded, whole_shape

__all__ = ["float8_cast_op", "float8_cast_rows_op", "moves_scale"]

torch.library.define(
    "kernel_pytorch::float8_cast",
    "(Tensor[] xs, Tensor? state, ScalarType dtype, bool row, bool transposed, str role, bool power_of_2, int axis=0,"
    " Tensor? row_factor=None, Tensor? column_factor=None, Tensor? after=None) -> (Tensor, Tensor, Tensor)",
)


def moves_scale(role: str) -> bool:
    """Return whether a cast moves the scale: a forward that the autograd engine runs is a checkpoint's, run again."""
    return role == "backward" or (role == "forward" and torch._C._current_graph_task_id() == -1)  # noqa: SLF001


def _cast(
    xs: list[torch.Tensor],
    state: torch.Tensor | None,
    dtype: torch.dtype,
    row: bool,
    transposed: bool,
    role: str,
    power_of_2: bool,
    axis: int = 0,
    row_factor: torch.Tensor | None = None,
    column_factor: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    del after
    counts, moves = role != "read", moves_scale(role)
    if xs[0].is_cuda or INTERPRETED:
        from kernel_pytorch.ops.float8_cast import float8_cast_kernel as kernel

        return kernel.cast(
            xs,
            state,
            dtype,
            row=row,
            transposed=transposed,
            update=counts,
            roll=moves,
            power_of_2=power_of_2,
            axis=axis,
            row_factor=row_factor,
            column_factor=column_factor,
        )
    from kernel_pytorch.ops.float8_cast.reference import cast_reference

    return cast_reference(
        xs, state, dtype, row=row, transposed=transposed, update=counts, roll=moves, power_of_2=power_of_2, axis=axis,
        row_factor=row_factor, column_factor=column_factor,
    )  # fmt: skip


for _kind in ("cuda", "cpu"):
    torch.library.impl("kernel_pytorch::float8_cast", _kind)(_cast)


@torch.library.register_fake("kernel_pytorch::float8_cast")
def _cast_fake(
    xs: list[torch.Tensor],
    state: torch.Tensor | None,
    dtype: torch.dtype,
    row: bool,
    transposed: bool,
    role: str,
    power_of_2: bool,
    axis: int = 0,
    row_factor: torch.Tensor | None = None,
    column_factor: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    del state, role, power_of_2, row_factor, column_factor, after
    rows, columns = whole_shape(xs, axis)
    x = xs[0]
    return (
        x.new_empty((rows, columns) if row else (0,), dtype=dtype),
        x.new_empty((columns, padded(rows)) if transposed else (0,), dtype=dtype),
        x.new_empty((1,), dtype=torch.float32),
    )


float8_cast_op = torch.ops.kernel_pytorch.float8_cast
"""`(xs, state, dtype, row, transposed, role, power_of_2, axis, row_factor, column_factor, after)`, without a gradient.

Args of the operator:
    xs: Matrices that become one, bfloat16, float16 or float32 (on a CPU also float64).
    state: Of a delayed scale (`layout.fresh_state`), written; `None` scales by the amax of `xs` themselves.
    dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
    row: Whether the row-major copy is wanted.
    transposed: Whether the transposed copy is wanted.
    role: `forward` or `backward`: first the amax of the casts before sets the scale, then the amax of `xs` is noted.
        A `forward` that a checkpoint recomputes uses the scale as it is; so does `note`, for parts after the first
        one of what is cast in parts. `read` leaves the state alone.
    power_of_2: Round scales down to powers of two.
    axis: 0 puts the matrices below each other (16 divides the rows of each but the last), 1 side by side.
    row_factor: Float32 `[rows]`, with `column_factor`: the one matrix is multiplied by both before it is cast, in
        float32, so that what a normalisation makes (`x * rstd * weight`) is not written and read in between.
    column_factor: `[columns]`, of any of the formats.
    after: What is not read: a compiler orders operators by what they take, and puts one that waits for nothing of a
        backward at its very beginning, with all others of its kind.

Results `(row, transposed, inverse)`, of the whole: FP8 `[rows, columns]`; FP8 `[columns, padded(rows)]`, zero beyond
`rows` (empty where not wanted); and float32 `[1]`, the factor that turns the copies back.
"""

torch.library.define(
    "kernel_pytorch::float8_cast_rows",
    "(Tensor[] xs, ScalarType dtype, bool row, bool transposed, bool power_of_2, int axis=0, Tensor? after=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


def _cast_rows(
    xs: list[torch.Tensor],
    dtype: torch.dtype,
    row: bool,
    transposed: bool,
    power_of_2: bool,
    axis: int = 0,
    after: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    del after
    if xs[0].is_cuda or INTERPRETED:
        from kernel_pytorch.ops.float8_cast import float8_rowwise_kernel as kernel

        return kernel.cast_rows(xs, dtype, row=row, transposed=transposed, power_of_2=power_of_2, axis=axis)
    from kernel_pytorch.ops.float8_cast.reference import cast_rows_reference

    return cast_rows_reference(xs, dtype, row=row, transposed=transposed, power_of_2=power_of_2, axis=axis)


for _kind in ("cuda", "cpu"):
    torch.library.impl("kernel_pytorch::float8_cast_rows", _kind)(_cast_rows)


@torch.library.register_fake("kernel_pytorch::float8_cast_rows")
def _cast_rows_fake(
    xs: list[torch.Tensor],
    dtype: torch.dtype,
    row: bool,
    transposed: bool,
    power_of_2: bool,
    axis: int = 0,
    after: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    del power_of_2, after
    rows, columns = whole_shape(xs, axis)
    return (
        xs[0].new_empty((rows, columns) if row else (0,), dtype=dtype),
        xs[0].new_empty((columns, padded(rows)) if transposed else (0,), dtype=dtype),
        xs[0].new_empty((rows if row else 0, 1), dtype=torch.float32),
        xs[0].new_empty((columns if transposed else 0, 1), dtype=torch.float32),
    )


float8_cast_rows_op = torch.ops.kernel_pytorch.float8_cast_rows
"""`(xs, dtype, row, transposed, power_of_2, axis) -> (row, transposed, inverse, turned_inverse)`: a scale for each row.

As `float8_cast_op` without a state. `inverse` is float32 `[rows, 1]`; the transposed copy has a scale for each of its
own rows, `turned_inverse` `[columns, 1]`.
"""
