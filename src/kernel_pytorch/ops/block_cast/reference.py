"""The definition of casts to block formats, in plain PyTorch; what the kernels compute, and CPUs run."""

from __future__ import annotations

from itertools import pairwise

import torch

from kernel_pytorch.ops.block_cast.formats import E2M1_MAX, BlockFormat, BlockMatrix

__all__ = ["block_cast_reference", "dequantised", "e2m1_codes", "e2m1_values"]

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, E2M1_MAX)
_LEAST_EXPONENT, _BIAS = -127, 127


def e2m1_codes(x: torch.Tensor) -> torch.Tensor:
    """Return values rounded to E2M1 (nearest, ties to even, saturated) as codes of four bits in uint8."""
    size = x.abs()
    code = torch.zeros_like(size, dtype=torch.uint8)
    for i, (low, high) in enumerate(pairwise(_E2M1)):
        middle = (low + high) / 2
        code += ((size > middle) | ((size == middle) & bool(i % 2))).to(torch.uint8)
    return code | (x.signbit().to(torch.uint8) << 3)


def e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    """Return what codes of four bits stand for, in float32."""
    table = torch.tensor([*_E2M1, *(-v for v in _E2M1)], device=codes.device)
    return table[codes.long()]


def block_cast_reference(x: torch.Tensor, kind: BlockFormat) -> BlockMatrix:
    """Return a matrix in a block format; see `api.block_cast`."""
    rows, columns = x.shape
    blocks = x.float().view(rows // kind.rows, kind.rows, columns // kind.columns, kind.columns)
    amax = blocks.abs().amax((1, 3))
    whole = torch.ones(1, device=x.device)
    if kind.scale == "e8m0":
        # The least power of two under which the largest element fits.
        fraction, exponent = torch.frexp(amax / kind.limit)
        exponent = torch.where(fraction == 0.5, exponent - 1, exponent).clamp(_LEAST_EXPONENT, _BIAS)
        exponent = torch.where(amax > 0, exponent, _LEAST_EXPONENT)
        scales = (exponent + _BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)
        wide = torch.exp2(exponent.float())
    elif kind.scale == "e4m3":
        most = x.float().abs().amax().reshape(1)
        whole = torch.where(most > 0, most / (kind.limit * torch.finfo(torch.float8_e4m3fn).max), 1.0)
        scales = (amax / (kind.limit * whole)).to(torch.float8_e4m3fn)
        wide = scales.float() * whole
    else:
        scales = wide = torch.where(amax > 0, amax / kind.limit, 1.0)
    scaled = torch.where(wide[:, None, :, None] > 0, blocks / wide[:, None, :, None], 0.0)
    scaled = scaled.clamp(-kind.limit, kind.limit).view(rows, columns)
    if kind.element == "e2m1":
        codes = e2m1_codes(scaled)
        return BlockMatrix(codes[:, ::2] | (codes[:, 1::2] << 4), scales, whole)
    return BlockMatrix(scaled.to(torch.float8_e4m3fn), scales, whole)


def dequantised(matrix: BlockMatrix, kind: BlockFormat, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return what a matrix in a block format stands for, exactly in fp64."""
    elements, scales, whole = matrix
    if kind.element == "e2m1":
        elements = torch.stack([e2m1_values(elements & 15), e2m1_values(elements >> 4)], -1).flatten(1)
    wide = scales.to(torch.float32).to(dtype) * whole.to(dtype)
    wide = wide.repeat_interleave(kind.rows, 0).repeat_interleave(kind.columns, 1)
    return elements.to(torch.float32).to(dtype) * wide
