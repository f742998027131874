"""What linear layers in FP8 carry beside their parameters: recipe, states of their scales, their weights in FP8.

Layers that read the same tensor (q, k and v of attention; gate and up of an MLP) share a site: their input is cast
once, their weights are one matrix, and so are the gradients of their outputs. The first of them that is called computes
all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from kernel_pytorch.ops.float8_cast import Float8Matrix, float8_cast, fresh_state
from kernel_pytorch.precision.recipes import Recipe

__all__ = ["OPERANDS", "SLOT", "Place", "Site", "place_of", "site_of", "sites_of"]

OPERANDS = ("input", "weight", "gradient")
SLOT = "_float8"
"""Attribute of a module that holds its place; not a buffer, so `state_dict` keeps its keys."""


class Site:
    """Recipe, scaling state and cached weight of linear layers that read the same tensor, usually of one.

    Args:
        recipe: How the layers are computed.
        layers: `nn.Linear` of equal `in_features`.

    Attributes:
        states: State of the delayed scale of `input`, `weight` and `gradient`; empty for recipes without.
        pending: Results that the first layer's call left for the others: what they were computed from, and by layer.
    """

    def __init__(self, recipe: Recipe, layers: list[nn.Linear]) -> None:
        self.recipe = recipe
        self.layers = layers
        self.states: dict[str, torch.Tensor] = {}
        if recipe.delayed:
            device = layers[0].weight.device
            self.states = {operand: fresh_state(recipe.history, device) for operand in OPERANDS}
        self.pending: tuple[Any, list[torch.Tensor | None]] | None = None
        self._cached: tuple[Any, Float8Matrix] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave results and the cached weight out of copies and pickles: they are made again."""
        return {**vars(self), "_cached": None, "pending": None}

    def weight(self, weights: list[torch.Tensor], *, transposed: bool) -> Float8Matrix:
        """Return the weights in FP8, below each other; in eager code kept until a parameter changes.

        That is once an optimizer step, however many micro-steps it has. Compiled code casts at every call: what a
        graph reads must be its input, and the parameter is.
        """
        role = "forward" if torch.is_grad_enabled() else "read"
        if torch.compiler.is_compiling():
            return self._cast(weights, transposed=transposed, role=role)
        key = tuple((w.data_ptr(), w._version, w.dtype, w.device) for w in weights)  # noqa: SLF001
        if self._cached is not None:
            known, cast = self._cached
            if known == key and (not transposed or cast.transposed.numel()):
                return cast
        cast = self._cast(weights, transposed=transposed, role=role)
        self._cached = (key, cast)
        return cast

    def forget_weight(self) -> None:
        """Free the cached weight; the next call casts it again."""
        self._cached = None

    def _cast(self, weights: list[torch.Tensor], *, transposed: bool, role: Any) -> Float8Matrix:
        return float8_cast(
            weights, self.recipe.dtype("weight"), self.states.get("weight"), transposed=transposed, role=role,
            power_of_2=self.recipe.power_of_2, by_row=self.recipe.by_row,
        )  # fmt: skip


class Place(NamedTuple):
    """Which of a site's layers a module is."""

    site: Site
    number: int


def place_of(module: nn.Module) -> Place | None:
    """Return the place of a layer that runs in FP8; `None` of any other module."""
    found = vars(module).get(SLOT)
    return found if isinstance(found, Place) else None


def site_of(module: nn.Module) -> Site | None:
    """Return the site of a layer that runs in FP8; `None` of any other module."""
    place = place_of(module)
    return None if place is None else place.site


def sites_of(model: nn.Module) -> Iterator[tuple[str, nn.Linear, Site]]:
    """Yield path, layer and site of every layer of a model that runs in FP8."""
    for path, module in model.named_modules():
        site = site_of(module)
        if site is not None and isinstance(module, nn.Linear):
            yield path, module, site
