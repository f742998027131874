"""What linear layers in FP8 carry beside their parameters: recipe, states of their scales, their weights in FP8.

Layers that read the same tensor (q, k and v of attention; gate and up of an MLP) share a site: their input is cast
once, their weights are one matrix, and so are the gradients of their outputs. The first of them that is called computes
all.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from kernel_pytorch.core.versions import count_fused_updates
from kernel_pytorch.errors import ModelError
from kernel_pytorch.ops.float8_cast import Float8Matrix, float8_cast, fresh_state
from kernel_pytorch.ops.float8_cast.counting import count_op
from kernel_pytorch.precision.gathered import gathered
from kernel_pytorch.precision.normed import Normed, Origin
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
        counters: Where a monitor counts what casts of an operand lose; empty where nobody watches.
        measured: Whether products run by algorithms of cuBLASLt that were measured, instead of PyTorch's.
        kept: Whether what the layers read is kept until the backward for others' sake (attention keeps its result).
        normed: The norm that makes what they read.
        pending: Results that the first layer's call left for the others: what they were computed from, and by layer.
    """

    def __init__(self, recipe: Recipe, layers: list[nn.Linear]) -> None:
        self.recipe = recipe
        self.layers = layers
        self.states: dict[str, torch.Tensor] = {}
        if recipe.delayed:
            device = layers[0].weight.device
            self.states = {operand: fresh_state(recipe.history, device) for operand in OPERANDS}
        self.counters: dict[str, torch.Tensor] = {}
        self.measured = False
        self.kept = False
        self.normed: Normed | None = None
        self.pending: tuple[Any, list[torch.Tensor | None]] | None = None
        self._cached: tuple[Any, Float8Matrix] | None = None
        self._held: Float8Matrix | None = None
        self._cast_already = False
        self._own: list[weakref.ref[torch.Tensor]] | None = [weakref.ref(layer.weight) for layer in layers]

    def __getstate__(self) -> dict[str, Any]:
        """Leave results and the cached weight out of copies and pickles: they are made again."""
        return {**vars(self), "_cached": None, "_held": None, "_own": None, "counters": {}, "pending": None}

    def weight(self, weights: list[torch.Tensor], *, transposed: bool) -> Float8Matrix:
        """Return the weights in FP8, below each other; in eager code kept until a parameter changes.

        That is once an optimizer step, however many micro-steps it has. Compiled code casts at every call, for what a
        graph reads must be its input, and the parameter is; unless the weight is held (`hold_weight`).
        """
        whole = gathered(weights)
        if whole is not None:
            return whole
        if torch.compiler.is_compiling():
            return self._held if self._held is not None else self._cast(weights, transposed=transposed, role=_role())
        role = _role()
        if not self._keeps(weights):
            return self._cast(weights, transposed=transposed, role=role)
        key = _versions(weights)
        if self._cached is not None:
            known, cast = self._cached
            if known == key and (not transposed or cast.transposed.numel()):
                return cast
            if known == key:
                role = "read"  # the scale has moved for this weight already
        if self._held is not None:
            self.hold_weight()
            return self._held
        if self._cast_already:
            role, self._cast_already = "read", False
        cast = self._cast(weights, transposed=transposed, role=role)
        self._cached = (key, cast)
        return cast

    def origin(self, x: torch.Tensor, rows: torch.Tensor) -> tuple[Origin, bool]:
        """Return what an input is cast from, and whether its transposed copy is made in the backward, from the same.

        Both in compiled code: there a norm's result need not exist, and what is not kept takes no memory.
        """
        if not torch.compiler.is_compiling():
            return Origin(rows), False
        made = None if self.normed is None or self.recipe.by_row else self.normed.origin(x)
        return (Origin(rows), self.kept) if made is None else (made, True)

    def turns_weight_later(self) -> bool:
        """Return whether the weight's transposed copy is made in the backward: in compiled code that holds none."""
        return torch.compiler.is_compiling() and self._held is None

    def _keeps(self, weights: list[torch.Tensor]) -> bool:
        """Return whether weights are the very parameters that the layers had: versions tell of changes of those.

        FSDP2 puts others in their place, into which it gathers without a new version.
        """
        if self._own is None:
            self._own = [weakref.ref(w) for w in weights]
        return all(known() is w for known, w in zip(self._own, weights, strict=True))

    def forget_weight(self) -> None:
        """Free the cached weight; the next call casts it again."""
        self._cached = self._held = None

    def hold_weight(self) -> None:
        """Cast the weights now, into memory that stays the same: compiled code reads it until this is called again."""
        weights: list[torch.Tensor] = [layer.weight for layer in self.layers]
        if not self._keeps(weights):
            raise ModelError(
                "a layer's weight is another parameter than when it was converted: it cannot be held",
                fix="hold weights without FSDP; with FSDP2 kp.precision.shard_weights casts before the gathering",
            )
        role = "read" if self._cast_already else "forward"
        self._cast_already = False
        cast = self._cast(weights, transposed=True, role=role)
        if self._held is None:
            self._held = cast
        else:
            for kept, fresh in zip(self._held, cast, strict=True):
                kept.copy_(fresh)
        self._cached = (_versions(weights), self._held)

    @property
    def weight_is_cast(self) -> bool:
        """Whether the state of the weight's scale knows the weight as it is."""
        return self._cast_already or (
            self._cached is not None and self._cached[0] == _versions([layer.weight for layer in self.layers])
        )

    def resume(self, states: dict[str, torch.Tensor], *, weight_is_cast: bool) -> None:
        """Take over states that were saved, into the memory of its own; `weight_is_cast` as it was then."""
        for operand, state in states.items():
            self.states[operand].copy_(state)
        self._cached, self._cast_already = None, weight_is_cast and bool(states)
        if self._held is not None:
            self.hold_weight()

    def _cast(self, weights: list[torch.Tensor], *, transposed: bool, role: Any) -> Float8Matrix:
        cast = float8_cast(
            weights, self.recipe.dtype("weight"), self.states.get("weight"), transposed=transposed, role=role,
            power_of_2=self.recipe.power_of_2, by_row=self.recipe.by_row,
        )  # fmt: skip
        return self.counted(weights, cast, "weight")

    def counted(self, xs: list[torch.Tensor], cast: Float8Matrix, operand: str) -> Float8Matrix:
        """Return a cast whose factors come by way of a monitor's counters, where there is one."""
        counters = self.counters.get(operand)
        if counters is None or not cast.inverse.numel():
            return cast
        known: torch.Tensor = count_op([x.detach() for x in xs], cast.inverse, self.recipe.dtype(operand), counters)
        return cast._replace(inverse=known, turned_inverse=cast.turned_inverse if self.recipe.by_row else known)


def _role() -> Any:
    return "forward" if torch.is_grad_enabled() else "read"


def _versions(weights: list[torch.Tensor]) -> Any:
    count_fused_updates()
    return tuple((w.data_ptr(), w._version, w.dtype, w.device) for w in weights)  # noqa: SLF001


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
