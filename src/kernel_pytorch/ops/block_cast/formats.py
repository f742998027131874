"""Formats whose scales belong to blocks of a matrix, and a matrix in one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = ["BLOCK_FORMATS", "E2M1_MAX", "BlockFormat", "BlockMatrix"]

E2M1_MAX = 6.0


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """What the elements are, what shares a scale, and what a scale is.

    Attributes:
        name: As kernels and tests name it.
        element: `e4m3`, or `e2m1` of four bits.
        rows: Of a block.
        columns: Of a block, along what a product sums over.
        scale: `float32`; `e8m0`, a power of two; or `e4m3`, under one float32 scale of the whole matrix.
    """

    name: str
    element: str
    rows: int
    columns: int
    scale: str

    @property
    def limit(self) -> float:
        """The largest number of an element."""
        return E2M1_MAX if self.element == "e2m1" else 448.0


class BlockMatrix(NamedTuple):
    """A matrix in a block format: elements times the scale of their block, times the scale of all.

    Attributes:
        elements: `[rows, columns]` FP8; of E2M1 uint8 `[rows, columns / 2]`, the even column in the low four bits.
        scales: `[rows / block rows, columns / block columns]`, row-major: float32, `float8_e8m0fnu` or `float8_e4m3fn`.
            Tensor cores want them in an order of their own, which is not made here.
        whole: Float32 `[1]`; 1 but for NVFP4.
    """

    elements: torch.Tensor
    scales: torch.Tensor
    whole: torch.Tensor


BLOCK_FORMATS: dict[str, BlockFormat] = {
    kind.name: kind
    for kind in (
        BlockFormat("fp8_1x128", "e4m3", 1, 128, "float32"),
        BlockFormat("fp8_128x128", "e4m3", 128, 128, "float32"),
        BlockFormat("mxfp8", "e4m3", 1, 32, "e8m0"),
        BlockFormat("nvfp4", "e2m1", 1, 16, "e4m3"),
    )
}
"""By name. FP8 by blocks: DeepSeek-V3 (arXiv:2412.19437). MXFP8: OCP Microscaling v1.0, with scales rounded up so that
nothing saturates (arXiv:2506.08027). NVFP4: arXiv:2509.25149, rounded to nearest, without its Hadamard transform."""
