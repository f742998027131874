"""Recipes whose scales belong to blocks: DeepSeek's FP8, and MXFP8 and NVFP4 of Blackwell.

They are emulated: operands are rounded as `ops.block_cast` rounds them, and multiplied in the layer's own format. The
kernels of the casts compile for sm_100 and newer; products by tensor cores are not wired to them. Verified: no.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from kernel_pytorch.ops.block_cast import BLOCK_FORMATS, block_cast, dequantised
from kernel_pytorch.precision.recipes import Product

__all__ = ["BLOCK_RECIPES", "UNVERIFIED", "BlockRecipe"]

_WHOLE = Product()
UNVERIFIED = "emulated in plain PyTorch, verified: no"


@dataclass(frozen=True, slots=True)
class BlockRecipe:
    """Formats of the operands of a layer's products, each with its blocks along what the product sums over.

    Attributes:
        name: As users name it.
        input_format: One of `ops.block_cast.BLOCK_FORMATS`, of the layer's input.
        weight_format: Of its weight.
        gradient_format: Of the gradient of its output.
        forward: `y = x @ w.T`.
        input_gradient: `dx = dy @ w`.
        weight_gradient: `dw = dy.T @ x`.
    """

    name: str
    input_format: str
    weight_format: str
    gradient_format: str
    forward: Product = _WHOLE
    input_gradient: Product = _WHOLE
    weight_gradient: Product = _WHOLE

    def rounded(self, x: torch.Tensor, operand: str, *, summed: int) -> torch.Tensor:
        """Return a matrix as the recipe rounds it, in its own dtype; blocks at the edges are filled with zeros.

        Args:
            x: `[rows, columns]`.
            operand: `input`, `weight` or `gradient`.
            summed: Dimension that the product sums over.
        """
        kind = BLOCK_FORMATS[str(getattr(self, f"{operand}_format"))]
        matrix = x if summed == 1 else x.t()
        rows, columns = matrix.shape
        whole = functional.pad(matrix, (0, -columns % kind.columns, 0, -rows % kind.rows)).contiguous()
        # The definition on every device: no kernel of these has been run on a GPU.
        back = dequantised(block_cast(whole.cpu(), kind.name), kind, torch.promote_types(x.dtype, torch.float32))
        back = back[:rows, :columns].to(x)
        return back if summed == 1 else back.t()


BLOCK_RECIPES: dict[str, BlockRecipe] = {
    recipe.name: recipe
    for recipe in (
        BlockRecipe("blockwise", "fp8_1x128", "fp8_128x128", "fp8_1x128"),
        BlockRecipe("mxfp8", "mxfp8", "mxfp8", "mxfp8"),
        BlockRecipe("nvfp4", "nvfp4", "nvfp4", "nvfp4"),
    )
}
"""By name. DeepSeek-V3 (arXiv:2412.19437); arXiv:2506.08027; arXiv:2509.25149 without stochastic rounding, Hadamard
transform and square blocks of the weight."""
