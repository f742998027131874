# mypy: disable-error-code="no-untyped-call, no-any-return"
"""Linear layers in FP8: three products, each of operands that were cast once, and FP8 kept for the backward.

A Hopper GPU multiplies FP8 matrices whose inner dimensions are adjacent in both, so the backward needs transposed
copies: of the weight for `dx`, and of input and gradient for `dw`. They are made by the pass that casts; in compiled
code those of weights, and of inputs that are kept in their own format anyway, by a pass in the backward, so that they
take no memory in between (two bytes an element more to read).
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from kernel_pytorch.ops.float8_cast import float8_cast
from kernel_pytorch.ops.float8_cast.counting import count_op
from kernel_pytorch.ops.float8_cast.op import float8_cast_op, float8_cast_rows_op
from kernel_pytorch.ops.float8_matmul.op import float8_matmul_op
from kernel_pytorch.precision.gathered import GatheredWeight, gathered
from kernel_pytorch.precision.gathered import turned as transpose
from kernel_pytorch.precision.recipes import Recipe, recipe_named
from kernel_pytorch.precision.site import OPERANDS, SLOT, Place, Site, place_of

__all__ = [
    "Float8Linear",
    "float8_linears",
    "joined_bias",
    "restore_linear",
    "result_dtype",
    "swap_linear",
    "swap_linears",
]

_Products = tuple[tuple[bool, bool, bool], ...]
"""Of result, input's gradient and weight's gradient: whether in FP8, with fast sums, and by a measured algorithm."""


class _Linears(torch.autograd.Function):
    """`x` and the weights are what gradients are for; what is multiplied are their copies in FP8.

    Tensors follow as weight and bias (or `None`) of each layer; there is one result for each.
    """

    @staticmethod
    def forward(ctx: Any, options: Any, x: torch.Tensor, small: Any, of_others: Any, *parameters: Any) -> Any:
        to, kinds, power_of_2, by_row, products, (later_x, later_weight) = options
        x_row, x_turned, x_inverse, x_turned_inverse, w_row, w_turned, w_inverse, w_turned_inverse = small
        weights, biases = parameters[::2], parameters[1::2]
        sizes = [len(w) for w in weights]
        # Of a weight that FSDP gathers again for the backward, the transposed copy is made there.
        again = isinstance(weights[0], GatheredWeight) or later_weight
        dy_state, counters, x_state, w_state, origin = of_others
        kept = [x if not products[2][0] else None, *([] if products[1][0] and not again else weights)]
        of_input = (x_state, *origin) if later_x else (None,) * 4
        ctx.save_for_backward(
            x_turned, x_turned_inverse, w_turned, w_turned_inverse, dy_state, counters, *of_input,
            w_state if later_weight else None, *kept,
        )  # fmt: skip
        ctx.options, ctx.sizes, ctx.x_dtype = (kinds, power_of_2, by_row, products), sizes, x.dtype
        ctx.dtypes = [None if p is None else p.dtype for p in parameters]
        if not products[0][0]:
            outs = [
                functional.linear(x.to(to), w.to(to), None if b is None else b.to(to))
                for w, b in zip(weights, biases, strict=True)
            ]
            return tuple(outs)
        bias = joined_bias(biases, sizes, to)
        y = float8_matmul_op(x_row, w_row, x_inverse, w_inverse, bias, to, *products[0][1:])
        return tuple(apart(y, sizes)) if len(sizes) > 1 else (y,)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (
            x_turned, x_inverse, w_turned, w_inverse, dy_state, counters, x_state, of_x, row_factor, column_factor,
            w_state, x, *weights,
        ) = ctx.saved_tensors  # fmt: skip
        (x_kind, w_kind, kind), power_of_2, by_row, products = ctx.options
        _, by_input, by_weight = products
        needs = ctx.needs_input_grad[4:]
        wants_x, wants_weight = ctx.needs_input_grad[1], any(needs[::2])
        row, turned = wants_x and by_input[0], wants_weight and by_weight[0]
        small: Any = (None, None, None, None)
        if row or turned:
            small = cast_gradients(
                dys, dy_state, kind, (row, turned), power_of_2=power_of_2, by_row=by_row, counters=counters
            )
        dy_row, dy_turned, dy_inverse, dy_turned_inverse = small
        dx = None
        if row and weights:
            w_turned, w_inverse = _turned_weights(
                weights, w_state, w_kind, power_of_2=power_of_2, by_row=by_row, after=dy_inverse
            )
        if turned and of_x is not None:
            factors = (row_factor, column_factor)
            x_turned, x_inverse = cast_turned(
                [of_x], x_state, x_kind, power_of_2=power_of_2, by_row=by_row, factors=factors, after=dy_inverse
            )
        if row:
            dx = float8_matmul_op(dy_row, w_turned, dy_inverse, w_inverse, None, ctx.x_dtype, *by_input[1:])
        elif wants_x:
            parts = [dy @ w.to(dy.dtype) for dy, w in zip(dys, weights, strict=True)]
            dx = sum(parts[1:], parts[0]).to(ctx.x_dtype)
        grads: list[torch.Tensor | None] = [None] * len(needs)
        if turned:
            to = ctx.dtypes[0]
            every = float8_matmul_op(dy_turned, x_turned, dy_turned_inverse, x_inverse, None, to, *by_weight[1:])
            grads[::2] = every.split(ctx.sizes, 0) if len(ctx.sizes) > 1 else (every,)
        elif wants_weight:
            grads[::2] = [(dy.t() @ x.to(dy.dtype)).to(ctx.dtypes[0]) for dy in dys]
        for i, dy in enumerate(dys):
            if needs[2 * i + 1]:
                wide = torch.promote_types(dy.dtype, torch.float32)
                grads[2 * i + 1] = dy.sum(0, dtype=wide).to(ctx.dtypes[2 * i + 1])
        return None, dx, None, None, *(g if n else None for g, n in zip(grads, needs, strict=True))


def cast_gradients(
    dys: Sequence[torch.Tensor],
    state: torch.Tensor | None,
    kind: torch.dtype,
    wanted: tuple[bool, bool],
    *,
    power_of_2: bool,
    by_row: bool,
    counters: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return gradients side by side in FP8: the wanted copies, and what turns each back."""
    if by_row:
        row, turned, inverse, turned_inverse = float8_cast_rows_op(list(dys), kind, *wanted, power_of_2, 1)
        if counters is not None and wanted[0]:
            inverse = count_op(list(dys), inverse, kind, counters)
        return row, turned, inverse, turned_inverse
    row, turned, inverse = float8_cast_op(list(dys), state, kind, *wanted, "backward", power_of_2, 1)
    if counters is not None:
        inverse = count_op(list(dys), inverse, kind, counters)
    return row, turned, inverse, inverse


def cast_turned(
    xs: Sequence[torch.Tensor],
    state: torch.Tensor | None,
    kind: torch.dtype,
    *,
    power_of_2: bool,
    by_row: bool,
    after: torch.Tensor,
    factors: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the transposed copy of what a forward cast without it, and what turns it back; scales stay as they are.

    It is made when `after` is there, and not before.
    """
    xs = [x.detach() for x in xs]
    wanted = (False, True)
    if by_row:
        _, turned, _, inverse = float8_cast_rows_op(xs, kind, *wanted, power_of_2, 0, after)
        return turned, inverse
    _, turned, inverse = float8_cast_op(xs, state, kind, *wanted, "read", power_of_2, 0, *factors, after)
    return turned, inverse


def _turned_weights(
    weights: list[torch.Tensor],
    state: torch.Tensor | None,
    kind: torch.dtype,
    *,
    power_of_2: bool,
    by_row: bool,
    after: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    whole = gathered(weights)
    if whole is None:
        return cast_turned(weights, state, kind, power_of_2=power_of_2, by_row=by_row, after=after)
    return transpose(whole.row), whole.inverse


def apart(y: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """Return columns of a result by layer.

    What is far smaller than the largest is copied, so that whoever keeps it (attention its values, where heads share
    them) does not keep the whole.
    """
    parts = y.split(sizes, 1)
    return [part.contiguous() if 2 * n <= max(sizes) else part for part, n in zip(parts, sizes, strict=True)]


def joined_bias(biases: Sequence[Any], sizes: list[int], to: torch.dtype) -> torch.Tensor | None:
    """Return biases as one vector, zeros where there is none; `None` where none has one."""
    given = [b for b in biases if b is not None]
    if not given:
        return None
    if len(biases) == 1:
        return given[0].to(to)
    parts = [given[0].new_zeros(n, dtype=to) if b is None else b.to(to) for b, n in zip(biases, sizes, strict=True)]
    return torch.cat(parts)


def result_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype of what a layer makes of `x`: its own, or autocast's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def float8_linears(x: torch.Tensor, site: Site) -> list[torch.Tensor]:
    """Return what each layer of a site makes of `x`, by its recipe, with gradients by it.

    Args:
        x: `[..., in_features]`.
        site: The layers, their recipe, scaling state and cache; written.

    Returns:
        `[..., out_features]` for each layer, in the dtype of `x`, or in autocast's; parts of one tensor.
    """
    recipe, layers = site.recipe, site.layers
    to = result_dtype(x)
    rows, learning = x.reshape(-1, x.shape[-1]), torch.is_grad_enabled()
    learns = learning and recipe.weight_gradient.float8 and any(layer.weight.requires_grad for layer in layers)
    passes = learning and recipe.input_gradient.float8 and x.requires_grad
    origin, later = site.origin(x, rows)
    later_x, later_weight = learns and later, passes and site.turns_weight_later()
    x8 = float8_cast(
        origin.x, recipe.dtype("input"), site.states.get("input"), row=recipe.forward.float8,
        transposed=learns and not later_x, role="forward" if learning else "read", power_of_2=recipe.power_of_2,
        by_row=recipe.by_row, factors=origin.factors,
    )  # fmt: skip
    x8 = site.counted([rows], x8, "input")
    weights: list[torch.Tensor] = [layer.weight for layer in layers]
    w8 = site.weight(weights, transposed=passes and not later_weight)
    products = (recipe.forward, recipe.input_gradient, recipe.weight_gradient)
    flags = tuple((p.float8, p.fast, site.measured) for p in products)
    kinds = tuple(recipe.dtype(operand) for operand in OPERANDS)
    options = (to, kinds, recipe.power_of_2, recipe.by_row, flags, (later_x, later_weight))
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    states = (site.states.get("input"), site.states.get("weight"))
    of_others = (site.states.get("gradient"), site.counters.get("gradient"), *states, tuple(origin))
    outs = _Linears.apply(options, rows, (*x8, *w8), of_others, *parameters)
    return [y.view(*x.shape[:-1], y.shape[-1]) if x.dim() != 2 else y for y in outs]


def _of_several(place: Place, x: torch.Tensor) -> torch.Tensor:
    """Return a layer's result from those that the site's first call left, or compute those of all its layers."""
    site, index = place
    kind = x.device.type
    settings: tuple[Any, ...] = (torch.is_grad_enabled(), torch.is_autocast_enabled(kind))
    if not torch.compiler.is_compiling():
        settings = (*settings, x._version)  # noqa: SLF001
    if site.pending is not None:
        (given, then), results = site.pending
        known = results[index]
        if given is x and then == settings and known is not None:
            results[index] = None
            if all(result is None for result in results):
                site.pending = None
            return known
    outs: list[torch.Tensor | None] = list(float8_linears(x, site))
    y = outs[index]
    assert y is not None
    outs[index] = None
    site.pending = ((x, settings), outs)
    return y


def forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    """Compute a layer by the recipe of its site. Named as what it replaces: unpickling then finds the class's own."""
    place: Place = vars(self)[SLOT]
    return _of_several(place, input) if len(place.site.layers) > 1 else float8_linears(input, place.site)[0]


def swap_linears(layers: Sequence[nn.Linear], recipe: str | Recipe) -> Site:
    """Let layers that read the same tensor run in FP8 as one, in place; class, parameters and `state_dict` keys stay.

    `forward` is set on the instance; `copy.deepcopy` binds it to the copy, and pickling drops it.
    """
    site = Site(recipe_named(recipe), list(layers))
    for index, module in enumerate(layers):
        setattr(module, SLOT, Place(site, index))
        module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
    return site


def swap_linear(module: nn.Linear, recipe: str | Recipe) -> Site:
    """Let one layer run in FP8, in place; see `swap_linears`."""
    return swap_linears([module], recipe)


def restore_linear(module: nn.Linear) -> None:
    """Give a layer its own `forward` back."""
    if place_of(module) is not None:
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
        setattr(self, SLOT, Place(Site(recipe_named(recipe), [self]), 0))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return `input @ weight.T + bias` by the recipe."""
        return forward(self, input)
