"""Whether FP8 would help a model, by how much and what limits it: told before anything is converted, without the GPU.

The decision is made as on the GPU (`choice.cheapest`), of times that are computed from measured rates instead of
measured. It is a prediction and says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from kernel_pytorch.core.workload import Call
from kernel_pytorch.precision.choice import PRODUCTS, LayerShape, cheapest
from kernel_pytorch.precision.convert import grouped
from kernel_pytorch.precision.eligible import verdicts
from kernel_pytorch.precision.observe import Seen, observe
from kernel_pytorch.precision.rates import Float8Rates, rates_of
from kernel_pytorch.precision.recipes import RECIPES, Recipe

__all__ = ["Forecast", "LayerForecast", "forecast", "layer_times"]

_FLOPS = 2.0
_ONE_COPY = 0.75
"""Of the bytes of a cast with both copies: three a bfloat16 element instead of four."""


@dataclass(frozen=True, slots=True)
class LayerForecast:
    """What is foreseen of linear layers that run as one, usually of one.

    Attributes:
        paths: Where they are in the model.
        shape: Rows, input and output features of all together, as they are used.
        plain_ms: Their products in bfloat16.
        float8_ms: The same by the recipe, with casts, where all products are in FP8.
        pays: Whether FP8 is at least 2 % faster.
        limit: What keeps it from twice as fast, or from being faster at all; of a layer that cannot be in FP8, why.
    """

    paths: tuple[str, ...]
    shape: str
    plain_ms: float
    float8_ms: float
    pays: bool
    limit: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is foreseen of a model.

    Attributes:
        arch: The architecture that it is foreseen for.
        source: The artefact that rates are from.
        recipe: By which layers are foreseen.
        layers: In the order of the model.
    """

    arch: str
    source: str
    recipe: str
    layers: tuple[LayerForecast, ...]

    @property
    def plain_ms(self) -> float:
        """All products of linear layers in bfloat16."""
        return sum(layer.plain_ms for layer in self.layers)

    @property
    def float8_ms(self) -> float:
        """The same with the layers that pay in FP8."""
        return sum(layer.float8_ms if layer.pays else layer.plain_ms for layer in self.layers)

    @property
    def answer(self) -> str:
        """The forecast in a sentence."""
        paying = sum(layer.pays for layer in self.layers)
        if not paying:
            reasons = sorted({layer.limit for layer in self.layers}, key=len)
            return f"FP8 is not foreseen to help on {self.arch}: {'; '.join(reasons[:2]) or 'no linear layer'}"
        ratio = self.plain_ms / self.float8_ms
        return (
            f"FP8 is foreseen to help {paying} of {len(self.layers)} groups of linear layers on {self.arch}: "
            f"{self.plain_ms:.3g} -> {self.float8_ms:.3g} ms a step, {ratio:.2f} times as fast in their products"
        )

    def __str__(self) -> str:
        lines = [self.answer, f"a prediction by rates measured in {self.source} ({self.recipe}, uncompiled layers)"]
        for layer in self.layers:
            times = f"{layer.plain_ms:.3g} -> {layer.float8_ms:.3g} ms" if layer.plain_ms else ""
            what = "FP8" if layer.pays else "keeps its format"
            lines.append(f"  {', '.join(layer.paths)} [{layer.shape}]: {what} {times} ({layer.limit})")
        return "\n".join(lines)


def forecast(
    model: nn.Module,
    call: Call | None = None,
    *,
    arch: str = "sm_90",
    recipe: str = "tensorwise_delayed",
    tokens: int = 8192,
    allow_lm_head: bool = False,
) -> Forecast:
    """Return what FP8 is foreseen to do for a model on an architecture; it need not be there.

    Args:
        model: On any device; a part of the call is run, without gradients, to see its layers' rows.
        call: What it is called with.
        arch: An architecture of `RATES`.
        recipe: A tensorwise recipe.
        tokens: Rows of a layer's input, where there is no call.
        allow_lm_head: Whether the layer that makes logits may run in FP8.

    Raises:
        InputsError: FP8 was not measured on this architecture.
    """
    rates, how = rates_of(arch), RECIPES[recipe]
    found = list(verdicts(model, allow_head=allow_lm_head))
    paths = {id(v.layer): v.path for v in found}
    layers = [v.layer for v in found]
    observed = None if call is None else observe(model, call, layers)
    seen = observed if isinstance(observed, Seen) else None
    able = [v.layer for v in found if not v.reason]
    ids = {id(m) for m in able}
    groups = None if seen is None else Seen([[m for m in g if id(m) in ids] for g in seen.groups], seen.rows)
    told = []
    for group in grouped(model, able, groups, how):
        first = group[0]
        rows = tokens if seen is None else seen.rows.get(id(first), tokens)
        shape = LayerShape(rows, first.in_features, sum(m.out_features for m in group), "bfloat16")
        told.append(_layer(tuple(paths[id(m)] for m in group), shape, rates, how))
    for verdict in found:
        if verdict.reason:
            rows = tokens if seen is None else seen.rows.get(id(verdict.layer), tokens)
            shape = LayerShape(rows, verdict.layer.in_features, verdict.layer.out_features, "bfloat16")
            plain = sum(layer_times(shape, rates, how)[f"plain {p}"] for p in PRODUCTS)
            told.append(LayerForecast((verdict.path,), shape.name, plain, plain, pays=False, limit=verdict.reason))
    return Forecast(arch, rates.source, recipe, tuple(told))


def layer_times(shape: LayerShape, rates: Float8Rates, recipe: Recipe) -> dict[str, float]:
    """Return milliseconds of products and casts of a layer, by the names that `choice.cheapest` takes."""
    flops = _FLOPS * shape.rows * shape.inside * shape.outside
    times: dict[str, float] = {}
    for product in PRODUCTS:
        rate = rates.fast_flops if getattr(recipe, product).fast else rates.exact_flops
        times[f"plain {product}"] = 1e3 * flops / rates.plain_flops
        times[f"float8 {product}"] = 1e3 * flops / rate
    sizes = {"input": shape.rows * shape.inside, "weight": shape.outside * shape.inside}
    sizes["gradient"] = shape.rows * shape.outside
    for operand, count in sizes.items():
        more = 0.0 if recipe.delayed else rates.amax_ns
        for side, share in (("row", _ONE_COPY), ("turned", _ONE_COPY), ("both", 1.0)):
            times[f"{operand} {side}"] = rates.cast_ms + 1e-6 * count * (share * rates.cast_ns + more)
    return times


def _layer(paths: tuple[str, ...], shape: LayerShape, rates: Float8Rates, recipe: Recipe) -> LayerForecast:
    times = layer_times(shape, rates, recipe)
    choice = cheapest(times, recipe)
    plain = choice.plain_ms
    products = sum(times[f"float8 {p}"] for p in PRODUCTS)
    casts = sum(times[f"{operand} both"] for operand in ("input", "weight", "gradient"))
    whole = max(products + casts, rates.layer_ms)
    pays = choice.recipe is not None and whole < 0.98 * plain
    if whole == rates.layer_ms:
        limit = f"launches: its kernels take {products + casts:.2g} ms, their launches {rates.layer_ms:.2g}"
    else:
        limit = f"casts take {casts / whole:.0%} of its time in FP8, products {products / whole:.0%}"
    return LayerForecast(paths, shape.name, plain, whole, pays, limit)
