"""What a linear layer in FP8 carries beside its parameters: its recipe, the states of its scales, its weight in FP8."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from kernel_pytorch.ops.float8_cast import Float8Matrix, float8_cast, fresh_state
from kernel_pytorch.precision.recipes import Recipe

__all__ = ["OPERANDS", "SLOT", "Site", "site_of", "sites_of"]

OPERANDS = ("input", "weight", "gradient")
SLOT = "_float8"
"""Attribute of a module that holds its site; not a buffer, so `state_dict` keeps its keys."""


class Site:
    """Recipe, scaling state and cached weight of one linear layer.

    Args:
        recipe: How the layer is computed.
        device: Where its weight is.

    Attributes:
        states: State of the delayed scale of `input`, `weight` and `gradient`; empty for recipes without.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe = recipe
        self.states: dict[str, torch.Tensor] = {}
        if recipe.delayed:
            self.states = {operand: fresh_state(recipe.history, device) for operand in OPERANDS}
        self._cached: tuple[Any, Float8Matrix] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cached weight out of copies and pickles: it is made again."""
        return {**vars(self), "_cached": None}

    def weight(self, weight: torch.Tensor, *, transposed: bool) -> Float8Matrix:
        """Return the weight in FP8; in eager code kept until the parameter changes, so once an optimizer step.

        Compiled code casts at every call: what a graph reads must be its input, and the parameter is.
        """
        role = "forward" if torch.is_grad_enabled() else "read"
        if torch.compiler.is_compiling():
            return self._cast(weight, transposed=transposed, role=role)
        key = (weight.data_ptr(), weight._version, weight.dtype, weight.device)  # noqa: SLF001
        if self._cached is not None:
            known, cast = self._cached
            if known == key and (not transposed or cast.transposed.numel()):
                return cast
        cast = self._cast(weight, transposed=transposed, role=role)
        self._cached = (key, cast)
        return cast

    def forget_weight(self) -> None:
        """Free the cached weight; the next call casts it again."""
        self._cached = None

    def _cast(self, weight: torch.Tensor, *, transposed: bool, role: Any) -> Float8Matrix:
        return float8_cast(
            weight, self.recipe.dtype("weight"), self.states.get("weight"), transposed=transposed, role=role,
            power_of_2=self.recipe.power_of_2,
        )  # fmt: skip


def site_of(module: nn.Module) -> Site | None:
    """Return the site of a layer that runs in FP8; `None` of any other module."""
    found = vars(module).get(SLOT)
    return found if isinstance(found, Site) else None


def sites_of(model: nn.Module) -> Iterator[tuple[str, nn.Linear, Site]]:
    """Yield path, layer and site of every layer of a model that runs in FP8."""
    for path, module in model.named_modules():
        site = site_of(module)
        if site is not None and isinstance(module, nn.Linear):
            yield path, module, site
