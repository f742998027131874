"""Which products of a layer pay in FP8 at its own shape: measured with all casts, and kept for the next process.

Each product and each cast is timed alone, in turns on a hot GPU; a layer's time for a choice of products is the sum of
those it needs. A product in FP8 needs copies of its operands, and two products share what one pass writes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kernel_pytorch.backends import manager_for
from kernel_pytorch.hardware import detect
from kernel_pytorch.measure.bursts import Bursts
from kernel_pytorch.measure.choices import choice_file, load_choices, store_choices
from kernel_pytorch.ops.float8_cast import float8_cast, fresh_state
from kernel_pytorch.ops.float8_matmul import float8_matmul
from kernel_pytorch.precision.recipes import Product, Recipe

__all__ = ["PRODUCTS", "Choice", "LayerShape", "cheapest", "choose"]

PRODUCTS = ("forward", "input_gradient", "weight_gradient")
_ROUNDS = 5
_LEAST_GAIN = 0.02
_COPIES: dict[str, tuple[str, str]] = {
    "forward": ("input row", "weight row"),
    "input_gradient": ("gradient row", "weight turned"),
    "weight_gradient": ("gradient turned", "input turned"),
}
"""What each product reads: which copy of which operand."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A linear layer as it is used.

    Attributes:
        rows: Of its input: samples times tokens.
        inside: Input features.
        outside: Output features; of layers that are one, all together.
        dtype: `bfloat16`, `float16` or `float32`.
    """

    rows: int
    inside: int
    outside: int
    dtype: str

    @property
    def name(self) -> str:
        """The name under which its times are kept."""
        return f"{self.rows}x{self.inside}x{self.outside} {self.dtype}"


@dataclass(frozen=True, slots=True)
class Choice:
    """The cheapest way found for a layer.

    Attributes:
        recipe: With the products that pay in FP8; `None` where none does.
        plain_ms: All products in the layer's own format.
        ms: As chosen, with casts.
    """

    recipe: Recipe | None
    plain_ms: float
    ms: float


def cheapest(times: dict[str, float], recipe: Recipe) -> Choice:
    """Return the choice of products that takes the least time.

    Args:
        times: Milliseconds of `plain PRODUCT`, `float8 PRODUCT`, and of casts: `OPERAND row`, `OPERAND turned`,
            `OPERAND both`.
        recipe: What runs in FP8.
    """
    plain = sum(times[f"plain {product}"] for product in PRODUCTS)
    best = plain
    chosen: tuple[str, ...] = ()
    for count in range(1, len(PRODUCTS) + 1):
        for subset in itertools.combinations(PRODUCTS, count):
            total = sum(times[f"{'float8' if p in subset else 'plain'} {p}"] for p in PRODUCTS)
            total += _casts_ms(times, {copy for p in subset for copy in _COPIES[p]})
            if total < best:
                best, chosen = total, subset
    if best > (1.0 - _LEAST_GAIN) * plain:
        return Choice(None, plain, plain)
    flags = {p: replace(getattr(recipe, p), float8=p in chosen) for p in PRODUCTS}
    return Choice(replace(recipe, **flags), plain, best)


def _casts_ms(times: dict[str, float], copies: set[str]) -> float:
    total = 0.0
    for operand in ("input", "weight", "gradient"):
        wanted = [side for side in ("row", "turned") if f"{operand} {side}" in copies]
        if wanted:
            total += times[f"{operand} {'both' if len(wanted) == 2 else wanted[0]}"]
    return total


def choose(shape: LayerShape, recipes: Sequence[Recipe], device: torch.device) -> Choice:
    """Return the cheapest choice among recipes for a layer on a GPU, measured at its first use.

    Raises:
        RuntimeError: CUDA's, where the shape does not fit into memory.
    """
    path, known = _stored(device.index or 0)
    found: list[Choice] = []
    for recipe in recipes:
        name = f"{shape.name} {recipe.name}"
        if name not in known:
            known[name] = _measure(shape, recipe, device)
            store_choices(path, {name: known[name]}, _software(device.index or 0))
        found.append(cheapest(known[name], recipe))
    return min(found, key=lambda choice: choice.ms)


def _software(index: int) -> dict[str, str]:
    spec = detect(f"cuda:{index}")
    versions = {name: spec.software[name] for name in ("torch", "triton", "driver") if name in spec.software}
    return {"device": spec.name, **versions}


@functools.cache
def _stored(index: int) -> tuple[Path, dict[str, Any]]:
    path = choice_file("float8", detect(f"cuda:{index}").key, _software(index))
    return path, load_choices(path)


@torch.no_grad()
def _measure(shape: LayerShape, recipe: Recipe, device: torch.device) -> dict[str, float]:
    dtype: torch.dtype = getattr(torch, shape.dtype)
    made = torch.Generator(device).manual_seed(0)
    sizes = {"input": (shape.rows, shape.inside), "weight": (shape.outside, shape.inside)}
    sizes["gradient"] = (shape.rows, shape.outside)
    full = {k: torch.randn(s, device=device, generator=made).to(dtype) for k, s in sizes.items()}
    casts = {k: _caster(x, k, recipe) for k, x in full.items()}
    small = {k: cast("both") for k, cast in casts.items()}
    x, w, dy = (full[k] for k in ("input", "weight", "gradient"))
    x8, w8, dy8 = (small[k] for k in ("input", "weight", "gradient"))

    def product(a: torch.Tensor, b: torch.Tensor, scales: tuple[Any, Any], how: Product) -> Callable[[], Any]:
        return lambda: float8_matmul(a, b, *scales, dtype=dtype, fast=how.fast)

    runs: dict[str, Callable[[], Any]] = {
        "plain forward": lambda: x @ w.t(),
        "plain input_gradient": lambda: dy @ w,
        "plain weight_gradient": lambda: dy.t() @ x,
        "float8 forward": product(x8.row, w8.row, (x8.inverse, w8.inverse), recipe.forward),
        "float8 input_gradient": product(
            dy8.row, w8.transposed, (dy8.inverse, w8.turned_inverse), recipe.input_gradient
        ),
        "float8 weight_gradient": product(
            dy8.transposed, x8.transposed, (dy8.turned_inverse, x8.turned_inverse), recipe.weight_gradient
        ),
    }
    for operand, cast in casts.items():
        for side in ("row", "turned", "both"):
            runs[f"{operand} {side}"] = functools.partial(cast, side)
    with manager_for(str(device)).exclusive():
        return Bursts(runs["plain forward"]).in_turns(runs, _ROUNDS)


def _caster(x: torch.Tensor, operand: str, recipe: Recipe) -> Callable[[str], Any]:
    state = fresh_state(recipe.history, x.device) if recipe.delayed else None

    def cast(side: str) -> Any:
        return float8_cast(
            x, recipe.dtype(operand), state, row=side != "turned", transposed=side != "row",
            power_of_2=recipe.power_of_2, by_row=recipe.by_row,
        )  # fmt: skip

    return cast
