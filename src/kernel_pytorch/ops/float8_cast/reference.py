"""The definition of casts to FP8 with one scale, in plain PyTorch; what the kernels compute, and CPUs run."""

from __future__ import annotations

import torch

from kernel_pytorch.ops.float8_cast.layout import HISTORY_AT, padded

__all__ = ["cast_reference", "cast_rows_reference", "quantise", "roll_reference", "scale_reference"]

_LARGEST_SCALE = 2.0**126


def scale_reference(amax: torch.Tensor, dtype: torch.dtype, *, power_of_2: bool = False) -> torch.Tensor:
    """Return the factor that brings `amax` to the largest number of a format: at most 2^126, and 1 for zero.

    Args:
        amax: Largest magnitudes, float32, of any shape.
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
        power_of_2: Round it down to a power of two, so that scaling is exact.
    """
    limit = torch.finfo(dtype).max
    # A number over a tensor is the tensor's reciprocal times the number in PyTorch: rounded twice.
    scale = torch.full_like(amax, limit).div(torch.where(amax > 0, amax, limit)).clamp_max(_LARGEST_SCALE)
    if power_of_2:
        scale = torch.where(scale.isfinite(), torch.exp2(torch.floor(torch.log2(scale))), scale)
    return scale


def quantise(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `x * scale` rounded to nearest even in a format, saturated; NaN for what is not finite.

    Args:
        x: Any floating-point dtype and shape.
        scale: Float32, of a shape that broadcasts against `x`.
        dtype: The format.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    limit = torch.finfo(dtype).max
    scaled = (wide * scale.to(wide.dtype)).clamp(-limit, limit)
    return torch.where(wide.isfinite(), scaled, torch.nan).to(torch.float32).to(dtype)


def roll_reference(state: torch.Tensor, dtype: torch.dtype, *, power_of_2: bool = False) -> None:
    """Take the amax of the last casts into the history and set the scale by it, in place."""
    place, last, scale = int(state[0]), state[1].clone(), state[2].clone()
    if not scale > 0:
        return
    history = state[HISTORY_AT:]
    if 0 < last < float("inf"):
        history[place] = last
        state[0] = (place + 1) % len(history)
    state[1] = 0.0
    most = history.max()
    if most > 0:
        state[2] = scale_reference(most, dtype, power_of_2=power_of_2)


def cast_reference(
    xs: list[torch.Tensor],
    state: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    row: bool,
    transposed: bool,
    update: bool,
    roll: bool,
    power_of_2: bool = False,
    axis: int = 0,
    row_factor: torch.Tensor | None = None,
    column_factor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `(row, transposed, inverse)`; see `op.float8_cast_op`."""
    x = torch.cat(xs, axis)
    if row_factor is not None and column_factor is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide) * row_factor.reshape(-1, 1).to(wide) * column_factor.to(wide)
    if state is not None:
        # Without a version: what a scale is set by is no change of a tensor that a backward has kept.
        state = state.data
    amax = x.detach().abs().amax().float() if x.numel() else torch.zeros((), device=x.device)
    if x.numel() == 0:
        inverse = torch.ones(1, dtype=torch.float32, device=x.device)
        empty = x.new_empty((x.shape[1], padded(len(x))) if transposed else (0,), dtype=torch.float32)
        return x.new_empty(x.shape if row else (0,), dtype=dtype), empty.zero_().to(dtype), inverse
    if state is not None and roll:
        roll_reference(state, dtype, power_of_2=power_of_2)
    if state is not None and bool(state[2] > 0):
        scale = state[2].clone()
        inverse = scale.reciprocal()
    else:
        scale = scale_reference(amax, dtype, power_of_2=power_of_2)
        inverse = torch.where(amax.isfinite(), scale.reciprocal(), torch.nan)
        if not amax.isfinite():
            scale = torch.ones_like(scale)
        elif state is not None and update and bool(amax > 0):
            state[2] = scale
    if state is not None and update and bool(state[2] > 0):
        state[1] = torch.where(amax.isnan() | state[1].isnan(), torch.nan, torch.maximum(state[1], amax))
    small = quantise(x, scale, dtype)
    turned = x.new_empty((0,), dtype=dtype)
    if transposed:
        bits = small.view(torch.uint8).t()
        turned = torch.nn.functional.pad(bits, (0, padded(len(x)) - len(x))).contiguous().view(dtype)
    return small if row else x.new_empty((0,), dtype=dtype), turned, inverse.reshape(1)


def cast_rows_reference(
    xs: list[torch.Tensor], dtype: torch.dtype, *, row: bool, transposed: bool, power_of_2: bool = False, axis: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `(row, transposed, inverse, turned inverse)`; see `op.float8_cast_rows_op`."""
    x = torch.cat(xs, axis)

    def one(matrix: torch.Tensor, *, wanted: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if not wanted:
            return x.new_empty((0,), dtype=dtype), x.new_empty((0, 1), dtype=torch.float32)
        if not matrix.numel():
            return matrix.to(dtype), torch.ones(len(matrix), 1, dtype=torch.float32, device=x.device)
        amax = matrix.abs().amax(1, keepdim=True).float()
        scale = scale_reference(amax, dtype, power_of_2=power_of_2)
        inverse = torch.where(amax.isfinite(), scale.reciprocal(), torch.nan)
        return quantise(matrix, torch.where(amax.isfinite(), scale, 1.0), dtype), inverse

    small, inverse = one(x, wanted=row)
    turned, turned_inverse = one(x.t(), wanted=transposed)
    if transposed:
        bits = turned.view(torch.uint8)
        turned = torch.nn.functional.pad(bits, (0, padded(len(x)) - len(x))).contiguous().view(dtype)
    return small, turned, inverse, turned_inverse
