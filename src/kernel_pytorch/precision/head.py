"""The loss of a layer that makes logits and runs in FP8, by chunks of rows: no logits, and no gradient of them."""

from __future__ import annotations

import torch
from torch import nn

from kernel_pytorch.ops.float8_cast import float8_cast
from kernel_pytorch.ops.linear_cross_entropy.float8_op import (
    GradientCast,
    Products,
    float8_linear_cross_entropy_apply,
)
from kernel_pytorch.precision.gathered import gathered
from kernel_pytorch.precision.linear import result_dtype
from kernel_pytorch.precision.site import Site

__all__ = ["float8_head_loss", "unchunked"]


def unchunked(site: Site) -> str:
    """Return why the loss of a layer in FP8 is not computed by chunks; an empty string where it is.

    Asked for at each call too: FSDP may have put another tensor in the place of the weight since.
    """
    recipe = site.recipe
    products = (recipe.forward, recipe.input_gradient, recipe.weight_gradient)
    rules = (
        (recipe.by_row, f"{recipe.name} has scales by row, and a transposed copy of a chunk would have others"),
        (not all(p.float8 for p in products), f"not all products of {recipe.name} run in FP8"),
        (len(site.layers) > 1, "it is one with others that read the same tensor"),
        (gathered([site.layers[0].weight]) is not None, "FSDP gathers its weight in FP8, without a transposed copy"),
    )
    return next((reason for applies, reason in rules if applies), "")


def float8_head_loss(
    hidden: torch.Tensor,
    site: Site,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk: int | None = None,
) -> torch.Tensor:
    """Return the cross-entropy of what a layer in FP8 makes of rows, with gradients by its recipe.

    Casts and products are those of the layer (`float8_linears`) with the loss after it: a step moves the scales of
    input and weight once, a monitor counts the same elements. The gradient of logits is cast before what comes from
    outside (a number that a loss is scaled by) is multiplied in, with a scale by what bounds it: its history is not
    looked at.

    Args:
        hidden: `[T, H]`.
        site: Of the one layer, for which `unchunked` has no reason; states written.
        labels: `[T]`, integers.
        ignore_index: Label of rows that have no loss and no gradient.
        reduction: `mean` over the rows that count, or `sum`.
        chunk: Rows at a time; as many as make logits of 1 GiB unless given.

    Returns:
        A scalar in float32, through which one backward can go.
    """
    recipe = site.recipe
    layer: nn.Linear = site.layers[0]
    learning = torch.is_grad_enabled()
    x8 = float8_cast(
        hidden, recipe.dtype("input"), site.states.get("input"),
        transposed=learning and layer.weight.requires_grad, role="forward" if learning else "read",
        power_of_2=recipe.power_of_2,
    )  # fmt: skip
    x8 = site.counted([hidden], x8, "input")
    w8 = site.weight([layer.weight], transposed=learning and hidden.requires_grad)
    fast = (recipe.forward.fast, recipe.input_gradient.fast, recipe.weight_gradient.fast)
    cast = GradientCast(recipe.dtype("gradient"), recipe.power_of_2, site.counters.get("gradient"))
    products = Products(result_dtype(hidden), fast, site.measured)
    return float8_linear_cross_entropy_apply(
        hidden, layer.weight, layer.bias, labels.to(torch.int64).contiguous(), x8, w8, cast, products,
        ignore_index=ignore_index, reduction=reduction, chunk=chunk,
    )  # fmt: skip
