# mypy: disable-error-code="no-untyped-call, no-any-return"
# ruff: noqa: PLR0917
"""The linear layer in FP8: three products, each of operands that were cast once, and FP8 kept for the backward.

A Hopper GPU multiplies FP8 matrices whose inner dimensions are adjacent in both, so the backward needs transposed
copies: of the weight for `dx`, and of input and gradient for `dw`. They are made by the pass that casts.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from kernel_pytorch.ops.float8_cast import float8_cast
from kernel_pytorch.ops.float8_cast.op import float8_cast_op
from kernel_pytorch.ops.float8_matmul.op import float8_matmul_op
from kernel_pytorch.precision.recipes import Recipe, recipe_named
from kernel_pytorch.precision.site import SLOT, Site, site_of

__all__ = ["Float8Linear", "float8_linear", "restore_linear", "swap_linear"]

_Options = tuple[torch.dtype, torch.dtype, bool, tuple[bool, bool], tuple[bool, bool], tuple[bool, bool]]
"""Dtype of the result, format of the gradient, powers of two; for each product whether in FP8, and whether fast."""


class _Linear(torch.autograd.Function):
    """`x` is what gradients are for; what is multiplied are its copies in FP8."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        x_row: torch.Tensor,
        x_turned: torch.Tensor,
        x_inverse: torch.Tensor,
        w_row: torch.Tensor,
        w_turned: torch.Tensor,
        w_inverse: torch.Tensor,
        dy_state: torch.Tensor | None,
        options: _Options,
    ) -> torch.Tensor:
        ctx.options, ctx.dtypes = options, (x.dtype, weight.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        _, _, _, forward, input_gradient, weight_gradient = options
        ctx.save_for_backward(
            None if weight_gradient[0] else x,
            None if input_gradient[0] else weight,
            x_turned, x_inverse, w_turned, w_inverse, dy_state,
        )  # fmt: skip
        to = options[0]
        if not forward[0]:
            return functional.linear(x.to(to), weight.to(to), None if bias is None else bias.to(to))
        small = None if bias is None else bias.to(to)
        return float8_matmul_op(x_row, w_row, x_inverse, w_inverse, small, to, forward[1])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, x_turned, x_inverse, w_turned, w_inverse, dy_state = ctx.saved_tensors
        _, kind, power_of_2, _, by_input, by_weight = ctx.options
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        row, turned = wants_x and by_input[0], wants_weight and by_weight[0]
        dx = dw = db = None
        if row or turned:
            dy_row, dy_turned, dy_inverse = float8_cast_op(dy, dy_state, kind, row, turned, "backward", power_of_2)
        if wants_x:
            if by_input[0]:
                dx = float8_matmul_op(dy_row, w_turned, dy_inverse, w_inverse, None, ctx.dtypes[0], by_input[1])
            else:
                dx = (dy @ weight.to(dy.dtype)).to(ctx.dtypes[0])
        if wants_weight:
            if by_weight[0]:
                dw = float8_matmul_op(dy_turned, x_turned, dy_inverse, x_inverse, None, ctx.dtypes[1], by_weight[1])
            else:
                dw = (dy.t() @ x.to(dy.dtype)).to(ctx.dtypes[1])
        if wants_bias:
            db = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
        return dx, dw, db, None, None, None, None, None, None, None, None


def float8_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, site: Site) -> torch.Tensor:
    """Return `x @ weight.T + bias` by the recipe of a site, with gradients by it.

    Args:
        x: `[..., in_features]`.
        weight: `[out_features, in_features]`; 16 divides both.
        bias: `[out_features]`.
        site: Recipe, scaling state and cache; written.

    Returns:
        `[..., out_features]` in the dtype of `x`, or in autocast's.
    """
    recipe = site.recipe
    to = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    rows = x.reshape(-1, x.shape[-1])
    learns = torch.is_grad_enabled() and weight.requires_grad and recipe.weight_gradient.float8
    passes = torch.is_grad_enabled() and x.requires_grad and recipe.input_gradient.float8
    x8 = float8_cast(
        rows, recipe.dtype("input"), site.states.get("input"), row=recipe.forward.float8, transposed=learns,
        role="forward" if torch.is_grad_enabled() else "read", power_of_2=recipe.power_of_2,
    )  # fmt: skip
    w8 = site.weight(weight, transposed=passes)
    y: torch.Tensor = _Linear.apply(rows, weight, bias, *x8, *w8, site.states.get("gradient"), _options(recipe, to))
    return y.view(*x.shape[:-1], weight.shape[0])


def _options(recipe: Recipe, to: torch.dtype) -> _Options:
    products = (recipe.forward, recipe.input_gradient, recipe.weight_gradient)
    forward, by_input, by_weight = ((p.float8, p.fast) for p in products)
    return to, recipe.dtype("gradient"), recipe.power_of_2, forward, by_input, by_weight


def forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    """Compute a layer by the recipe of its site. Named as what it replaces: unpickling then finds the class's own."""
    return float8_linear(input, self.weight, self.bias, vars(self)[SLOT])


def swap_linear(module: nn.Linear, recipe: str | Recipe) -> Site:
    """Let a layer run in FP8, in place: its class, parameters and `state_dict` keys stay.

    `forward` is set on the instance; `copy.deepcopy` binds it to the copy, and pickling drops it.
    """
    site = Site(recipe_named(recipe), module.weight.device)
    setattr(module, SLOT, site)
    module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
    return site


def restore_linear(module: nn.Linear) -> None:
    """Give a layer its own `forward` back."""
    if site_of(module) is not None:
        vars(module).pop("forward", None)
        vars(module).pop(SLOT)


class Float8Linear(nn.Linear):
    """`nn.Linear` in FP8, for models that are written with it; the same parameters and `state_dict`.

    Args:
        in_features: A multiple of 16.
        out_features: A multiple of 16.
        bias: As of `nn.Linear`.
        device: As of `nn.Linear`.
        dtype: As of `nn.Linear`.
        recipe: A recipe or its name (`recipes.RECIPES`).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,  # noqa: FBT001, FBT002  # nn.Linear's own signature
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: str | Recipe = "tensorwise_delayed",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        setattr(self, SLOT, Site(recipe_named(recipe), self.weight.device))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return `input @ weight.T + bias` by the recipe."""
        return forward(self, input)
