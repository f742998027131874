"""How a linear layer is computed in FP8: formats and scales of its operands, and what each product may do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from kernel_pytorch.errors import InputsError
from kernel_pytorch.ops.float8_cast import FORMATS

__all__ = ["RECIPES", "Product", "Recipe", "Scaling", "holds_tails", "recipe_named"]


class Scaling(StrEnum):
    """What shares a scale, and where the scale comes from."""

    CURRENT = "current"
    """One scale a tensor, by its own largest magnitude: another read of the tensor."""
    DELAYED = "delayed"
    """One scale a tensor, by the largest magnitude of the last casts: one pass; what grows beyond it saturates."""
    ROWWISE = "rowwise"
    """A scale for each row of an operand along what its product sums over, by its own largest magnitude."""


@dataclass(frozen=True, slots=True)
class Product:
    """One of the three products of a linear layer.

    Attributes:
        float8: Whether it runs in FP8; else in the dtype of the layer's input.
        fast: Sums in the tensor cores' own accumulators (fewer bits than float32, and less energy).
    """

    float8: bool = True
    fast: bool = True


@dataclass(frozen=True, slots=True)
class Recipe:
    """Formats, scales and products.

    Attributes:
        name: As users and plans name it.
        scaling: Of all operands.
        input_format: `e4m3` or `e5m2`, of the layer's input.
        weight_format: Of its weight.
        gradient_format: Of the gradient of its output.
        forward: `y = x @ w.T`.
        input_gradient: `dx = dy @ w`.
        weight_gradient: `dw = dy.T @ x`.
        history: Casts that a delayed scale looks back on; a power of two.
        power_of_2: Round scales down to powers of two, so that scaling itself is exact.

    Raises:
        InputsError: An unknown format, both operands of a product in E5M2, or a history that is no power of two.
    """

    name: str
    scaling: Scaling
    input_format: str = "e4m3"
    weight_format: str = "e4m3"
    gradient_format: str = "e5m2"
    forward: Product = Product()
    input_gradient: Product = Product(fast=False)
    weight_gradient: Product = Product(fast=False)
    history: int = 16
    power_of_2: bool = False

    def __post_init__(self) -> None:
        formats = (self.input_format, self.weight_format, self.gradient_format)
        if any(f not in FORMATS for f in formats):
            raise InputsError(f"recipe {self.name}: formats are {', '.join(FORMATS)}, got {', '.join(formats)}")
        wide = [f == "e5m2" for f in formats]
        if (wide[0] and wide[1]) or (wide[2] and (wide[0] or wide[1])):
            raise InputsError(f"recipe {self.name}: tensor cores multiply no two matrices of e5m2")
        if self.history < 1 or self.history & (self.history - 1):
            raise InputsError(f"recipe {self.name}: history must be a power of two, got {self.history}")

    @property
    def delayed(self) -> bool:
        """Whether scales come from casts before."""
        return self.scaling is Scaling.DELAYED

    @property
    def by_row(self) -> bool:
        """Whether each row of an operand has a scale of its own."""
        return self.scaling is Scaling.ROWWISE

    def amax(self, magnitudes: torch.Tensor, operand: str, *, summed: int) -> torch.Tensor:
        """Return the largest magnitude that each element shares its scale with, of a shape that broadcasts.

        Args:
            magnitudes: `[rows, columns]`.
            operand: `input`, `weight` or `gradient`.
            summed: Dimension that the product sums over.
        """
        del operand
        if self.scaling is Scaling.ROWWISE:
            return magnitudes.amax(summed, keepdim=True)
        return magnitudes.amax().reshape(1, 1)

    def dtype(self, operand: str) -> torch.dtype:
        """Return the format of `input`, `weight` or `gradient`."""
        return FORMATS[str(getattr(self, f"{operand}_format"))]


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("tensorwise_delayed", Scaling.DELAYED, power_of_2=True),
        Recipe("tensorwise_current", Scaling.CURRENT, power_of_2=True),
        Recipe("rowwise", Scaling.ROWWISE, gradient_format="e4m3", power_of_2=True),
        Recipe(
            "rowwise_high_weight_gradient",
            Scaling.ROWWISE,
            gradient_format="e4m3",
            power_of_2=True,
            weight_gradient=Product(float8=False),
        ),
    )
}
"""By name. Formats of tensorwise recipes: Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv:2209.05433).

Scales are powers of two: a format of floating point loses no precision by that, only up to half of its range at the
lower end, and a delayed scale that moves does not change what a value is rounded to.
"""


def holds_tails(name: str | Recipe) -> bool:
    """Return whether a recipe's format of gradients has the range of those of logits: E5M2."""
    return recipe_named(name).gradient_format == "e5m2"


def recipe_named(name: str | Recipe) -> Recipe:
    """Return a recipe by its name; a recipe itself is returned as it is.

    Raises:
        InputsError: There is none of that name.
    """
    if isinstance(name, Recipe):
        return name
    if name not in RECIPES:
        raise InputsError(f"no FP8 recipe is called {name!r}", fix=f"one of: {', '.join(RECIPES)}")
    return RECIPES[name]
