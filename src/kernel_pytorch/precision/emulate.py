# mypy: disable-error-code="no-untyped-call, no-any-return"
"""Recipes of FP8 emulated in plain PyTorch, in the model's own precision: what rounding the operands alone costs.

Nothing here uses the kernels or the tensor cores, so it is what they are held against.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from kernel_pytorch.ops.float8_cast import float8_cast
from kernel_pytorch.ops.float8_cast.reference import quantise, scale_reference
from kernel_pytorch.precision.blocks import BLOCK_RECIPES, BlockRecipe
from kernel_pytorch.precision.recipes import Recipe, recipe_named
from kernel_pytorch.precision.site import Site

__all__ = ["EMULATED", "emulate_linear", "multiplied", "rounded"]

EMULATED = "_float8_emulated"
"""Attribute of a layer that computes by an emulation: the name of the recipe."""


def rounded(x: torch.Tensor, recipe: Recipe | BlockRecipe, operand: str, *, summed: int) -> torch.Tensor:
    """Return a matrix as a recipe rounds it, in its own dtype, scaled by its own largest magnitudes.

    Args:
        x: `[rows, columns]`.
        recipe: Formats and what shares a scale.
        operand: `input`, `weight` or `gradient`.
        summed: Dimension that the product sums over; recipes with a scale for each row of an operand have it along it.
    """
    if isinstance(recipe, BlockRecipe):
        return recipe.rounded(x, operand, summed=summed)
    dtype = recipe.dtype(operand)
    amax = recipe.amax(x.detach().abs(), operand, summed=summed).float()
    scale = scale_reference(amax, dtype, power_of_2=recipe.power_of_2)
    return (quantise(x, scale, dtype).to(x.dtype) / scale.to(x.dtype)).to(x.dtype)


def multiplied(x: torch.Tensor, site: Site, operand: str, *, summed: int) -> torch.Tensor:
    """Return in fp64 what a site multiplies in the place of a matrix, at the scales that it used last.

    This is by the casts that the site runs, so that a product of these is exact but for the rounding of its sum.

    Args:
        x: `[rows, columns]`: input, gradient, or the weights below each other.
        site: Recipe and states; only read.
        operand: `input`, `weight` or `gradient`.
        summed: Dimension that the product sums over.
    """
    recipe = site.recipe
    cast = float8_cast(
        x, recipe.dtype(operand), site.states.get(operand), row=summed == 1, transposed=summed == 0, role="read",
        power_of_2=recipe.power_of_2, by_row=recipe.by_row,
    )  # fmt: skip
    if summed == 1:
        return cast.row.double() * cast.inverse.double()
    return (cast.transposed[:, : len(x)].double() * cast.turned_inverse.double()).t()


class _Emulated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, recipe: Recipe | BlockRecipe, x: torch.Tensor, weight: torch.Tensor, bias: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe = recipe
        if not recipe.forward.float8:
            return functional.linear(x, weight, bias)
        small = (rounded(x, recipe, "input", summed=1), rounded(weight, recipe, "weight", summed=1))
        return functional.linear(*small, bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        recipe: Recipe | BlockRecipe = ctx.recipe
        dx = dw = None
        if ctx.needs_input_grad[1]:
            pair = (dy, weight)
            if recipe.input_gradient.float8:
                pair = (rounded(dy, recipe, "gradient", summed=1), rounded(weight, recipe, "weight", summed=0))
            dx = pair[0] @ pair[1]
        if ctx.needs_input_grad[2]:
            pair = (dy, x)
            if recipe.weight_gradient.float8:
                pair = (rounded(dy, recipe, "gradient", summed=0), rounded(x, recipe, "input", summed=0))
            dw = pair[0].t() @ pair[1]
        return None, dx, dw, dy.sum(0) if ctx.needs_input_grad[3] else None


def emulate_linear(module: nn.Linear, recipe: str | Recipe | BlockRecipe) -> None:
    """Let a layer compute by an emulation of a recipe, in place: for judging, not for speed."""
    blocks = BLOCK_RECIPES.get(recipe) if isinstance(recipe, str) else recipe
    chosen = blocks if isinstance(blocks, BlockRecipe) else recipe_named(recipe)  # type: ignore[arg-type]
    setattr(module, EMULATED, chosen.name)

    def forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
        kind = input.device.type
        to = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        bias = None if self.bias is None else self.bias.to(to)
        y: torch.Tensor = _Emulated.apply(chosen, input.reshape(-1, input.shape[-1]).to(to), self.weight.to(to), bias)
        return y.view(*input.shape[:-1], y.shape[-1])

    module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
