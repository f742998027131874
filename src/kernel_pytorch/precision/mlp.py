# mypy: disable-error-code="no-untyped-call, no-any-return"
"""A gated MLP in FP8 as one: `down(activation(gate(x)) * up(x))`, where what lies between is cast by what makes it.

The product of activation and `up` exists in FP8 only, and so do the gradients of gate and up. Kept for the backward
are the input transposed in FP8 (in compiled code what it is cast from, where that is kept anyway), and gate and up
themselves: the product is computed again, transposed, by the kernel that computes the gradients.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from kernel_pytorch.ops.float8_cast import float8_cast
from kernel_pytorch.ops.float8_cast.counting import count_op
from kernel_pytorch.ops.float8_cast.op import float8_cast_op
from kernel_pytorch.ops.float8_gated_mlp import float8_gated_mlp_backward_op, float8_gated_mlp_op
from kernel_pytorch.ops.float8_matmul.op import float8_matmul_op
from kernel_pytorch.precision.linear import cast_turned, joined_bias, result_dtype, swap_linears
from kernel_pytorch.precision.recipes import Recipe, recipe_named
from kernel_pytorch.precision.site import OPERANDS, Site

__all__ = ["MLP_SLOT", "float8_mlp", "fusible", "restore_mlp", "swap_mlp"]

MLP_SLOT = "_float8_mlp"


class _GatedMLP(torch.autograd.Function):
    """`x` and the parameters (weight and bias of gate, up and down) are what gradients are for."""

    @staticmethod
    def forward(ctx: Any, options: Any, x: torch.Tensor, small: Any, states: Any, *parameters: Any) -> torch.Tensor:
        to, kinds, power_of_2, activation, role, fast, (later_x, later_weights) = options
        (x_row, x_turned, x_inverse), (w_row, w_turned, w_inverse), (d_row, d_turned, d_inverse) = small
        product_state, gate_up_state, dy_state, product_counters, *counters, of_input, of_weights = states
        sizes = [len(parameters[0]), len(parameters[2])]
        bias = joined_bias((parameters[1], parameters[3]), sizes, to)
        gate_up = float8_matmul_op(x_row, w_row, x_inverse, w_inverse, bias, to, *fast[0])
        row, inverse = float8_gated_mlp_op(gate_up, product_state, kinds[0], activation, role, power_of_2)
        if product_counters is not None:
            inverse = count_op([row], inverse, kinds[0], product_counters)
        bias = joined_bias((parameters[5],), [len(parameters[4])], to)
        y = float8_matmul_op(row, d_row, inverse, d_inverse, bias, to, *fast[0])
        ctx.save_for_backward(
            x_turned, x_inverse, w_turned, w_inverse, d_turned, d_inverse, gate_up, inverse, gate_up_state, dy_state,
            *counters, *(of_input if later_x else (None,) * 4),
            *((*of_weights, *parameters[::2]) if later_weights else (None,) * 5),
        )  # fmt: skip
        ctx.options = (kinds, power_of_2, activation, fast, sizes, x.dtype)
        ctx.dtypes = [None if p is None else p.dtype for p in parameters]
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (
            x_turned, x_inverse, w_turned, w_inverse, d_turned, d_inverse, gate_up, inverse, gate_up_state, dy_state,
            gate_up_counters, dy_counters, x_state, of_x, row_factor, column_factor, w_state, d_state, *weights,
        ) = ctx.saved_tensors  # fmt: skip
        (product_kind, weight_kind, kind), power_of_2, activation, fast, sizes, x_dtype = ctx.options
        needs = ctx.needs_input_grad[4:]
        learns, learns_down = needs[0] or needs[2], needs[4]
        dy_row, dy_turned, dy_inverse = float8_cast_op(
            [dy],
            dy_state,
            kind,
            True,  # noqa: FBT003
            learns_down,
            "backward",
            power_of_2,
        )
        if dy_counters is not None:
            dy_inverse = count_op([dy], dy_inverse, kind, dy_counters)
        later = (weight_kind, power_of_2)
        d_turned, d_inverse = _turned((d_turned, d_inverse), weights[2:], d_state, later, dy_inverse)
        grad = float8_matmul_op(dy_row, d_turned, dy_inverse, d_inverse, None, gate_up.dtype, *fast[1])
        row, turned, gate_up_inverse, product = float8_gated_mlp_backward_op(
            grad, gate_up, gate_up_state, inverse, kind, product_kind, activation, True, learns, learns_down,  # noqa: FBT003
            power_of_2,
        )  # fmt: skip
        if gate_up_counters is not None:
            gate_up_inverse = count_op([row], gate_up_inverse, kind, gate_up_counters)
        grads: list[torch.Tensor | None] = [None] * 6
        if learns_down:
            grads[4] = float8_matmul_op(dy_turned, product, dy_inverse, inverse, None, ctx.dtypes[4], *fast[2])
        if learns and of_x is not None:
            factors = (row_factor, column_factor)
            x_turned, x_inverse = cast_turned(
                [of_x], x_state, product_kind, power_of_2=power_of_2, by_row=False, factors=factors,
                after=gate_up_inverse,
            )  # fmt: skip
        if learns:
            whole = float8_matmul_op(turned, x_turned, gate_up_inverse, x_inverse, None, ctx.dtypes[0], *fast[2])
            grads[0], grads[2] = whole.split(sizes, 0)
        dx = None
        if ctx.needs_input_grad[1]:
            w_turned, w_inverse = _turned((w_turned, w_inverse), weights[:2], w_state, later, gate_up_inverse)
            dx = float8_matmul_op(row, w_turned, gate_up_inverse, w_inverse, None, x_dtype, *fast[1])
        if needs[1] or needs[3]:
            # Biases of gate and up: their gradients exist in FP8 only.
            wide = row.to(torch.float32).sum(0) * gate_up_inverse
            grads[1], grads[3] = (
                part.to(to) if to else None for part, to in zip(wide.split(sizes), ctx.dtypes[1:4:2], strict=True)
            )
        if needs[5]:
            grads[5] = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.dtypes[5])
        return None, dx, None, None, *(g if n else None for g, n in zip(grads, needs, strict=True))


def _turned(made: Any, weights: list[Any], state: torch.Tensor | None, options: Any, after: torch.Tensor) -> Any:
    """Return weights transposed, and what turns them back: what the forward made, or where it did not, made now."""
    if weights[0] is None:
        return made
    kind, power_of_2 = options
    return cast_turned(weights, state, kind, power_of_2=power_of_2, by_row=False, after=after)


def float8_mlp(x: torch.Tensor, first: Site, last: Site, activation: str) -> torch.Tensor:
    """Return `down(activation(gate(x)) * up(x))` in FP8.

    Args:
        x: `[..., in_features]`.
        first: Of gate and up, in this order.
        last: Of down; its input is the product.
        activation: As of `ops.gated_mlp`.
    """
    recipe, learning = first.recipe, torch.is_grad_enabled()
    to = result_dtype(x)
    rows, role = x.reshape(-1, x.shape[-1]), "forward" if learning else "read"
    gate, up, down = (*first.layers, *last.layers)
    learns = learning and (gate.weight.requires_grad or up.weight.requires_grad)
    origin, later = first.origin(x, rows)
    later_x = learns and later
    x8 = float8_cast(
        origin.x, recipe.dtype("input"), first.states.get("input"), transposed=learns and not later_x,
        role=role, power_of_2=recipe.power_of_2, factors=origin.factors,  # type: ignore[arg-type]
    )  # fmt: skip
    later_weights = learning and first.turns_weight_later() and last.turns_weight_later()
    w8 = first.weight([gate.weight, up.weight], transposed=learning and not later_weights)
    d8 = last.weight([down.weight], transposed=learning and not later_weights)
    products = (recipe.forward, recipe.input_gradient, recipe.weight_gradient)
    kinds = tuple(recipe.dtype(operand) for operand in OPERANDS)
    fast = tuple((p.fast, first.measured) for p in products)
    options = (to, kinds, recipe.power_of_2, activation, role, fast, (later_x, later_weights))
    x8 = first.counted([rows], x8, "input")
    places = ((last, "input"), (first, "gradient"), (last, "gradient"))
    of_input = (first.states.get("input"), *origin)
    of_weights = (first.states.get("weight"), last.states.get("weight"))
    states = (
        *(s.states.get(o) for s, o in places), *(s.counters.get(o) for s, o in places), of_input, of_weights,
    )  # fmt: skip
    parameters = [p for layer in (gate, up, down) for p in (layer.weight, layer.bias)]
    y: torch.Tensor = _GatedMLP.apply(options, rows, (tuple(x8[:3]), tuple(w8[:3]), tuple(d8[:3])), states, *parameters)
    return y.view(*x.shape[:-1], y.shape[-1])


def fusible(recipe: str | Recipe, layers: tuple[nn.Linear, nn.Linear, nn.Linear]) -> bool:
    """Return whether gate, up and down can be one: all products in FP8, alike, and nobody watches what lies between."""
    recipe = recipe_named(recipe)
    gate, up, _ = layers
    watched = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in layers)  # noqa: SLF001
    same = gate.weight.shape == up.weight.shape and len({m.weight.dtype for m in layers}) == 1
    whole = recipe.forward.float8 and recipe.input_gradient.float8 and recipe.weight_gradient.float8
    return whole and not recipe.by_row and same and not watched and len({id(m.weight) for m in layers}) == 3


def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Compute a gated MLP by the recipe of its sites. Named as what it replaces, as in `linear`."""
    return float8_mlp(x, *vars(self)[MLP_SLOT])


def swap_mlp(
    module: nn.Module, layers: tuple[nn.Linear, nn.Linear, nn.Linear], activation: str, recipe: str | Recipe
) -> None:
    """Let a gated MLP run in FP8 as one, in place; its class, parameters and `state_dict` keys stay.

    Args:
        module: Computes `down(activation(gate(x)) * up(x))` of its only argument.
        layers: Its gate, up and down; called on their own they run in FP8, too.
        activation: As of `ops.gated_mlp`.
        recipe: All of its products are in FP8 (`fusible`).
    """
    gate, up, down = layers
    first, last = swap_linears([gate, up], recipe), swap_linears([down], recipe)
    setattr(module, MLP_SLOT, (first, last, activation))
    module.forward = types.MethodType(forward, module)


def restore_mlp(module: nn.Module) -> None:
    """Give a gated MLP its own `forward` back; its layers keep theirs (`restore_linear`)."""
    if MLP_SLOT in vars(module):
        vars(module).pop("forward", None)
        vars(module).pop(MLP_SLOT)
