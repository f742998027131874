"""Convert a model's linear layers to FP8 in place, and tell of each what became of it and why.

model = kp.precision.convert(model, recipe="auto", example_inputs=batch)
print(kp.precision.report(model))
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from kernel_pytorch.core.workload import Call, as_call
from kernel_pytorch.errors import ModelError
from kernel_pytorch.ops.float8_matmul import emulated, unsupported
from kernel_pytorch.ops.gated_mlp.matching import gated_mlp_options
from kernel_pytorch.ops.gated_mlp.reference import gated_mlp_reference
from kernel_pytorch.ops.rms_norm.matching import rms_norm_options
from kernel_pytorch.ops.rms_norm.reference import rms_norm_reference
from kernel_pytorch.precision.blocks import BLOCK_RECIPES, UNVERIFIED
from kernel_pytorch.precision.choice import PRODUCTS, Choice, LayerShape, choose
from kernel_pytorch.precision.eligible import Verdict, verdicts
from kernel_pytorch.precision.emulate import EMULATED, emulate_linear
from kernel_pytorch.precision.fallback import fallen
from kernel_pytorch.precision.linear import restore_linear, swap_linears
from kernel_pytorch.precision.mlp import fusible, restore_mlp, swap_mlp
from kernel_pytorch.precision.normed import restore_norm, watch_norm
from kernel_pytorch.precision.observe import Seen, alike, observe
from kernel_pytorch.precision.recipes import RECIPES, Recipe, recipe_named
from kernel_pytorch.precision.site import site_of

__all__ = ["LayerReport", "Report", "convert", "grouped", "report", "restore", "swap_model", "swapped", "undo"]

_REPORT = "_float8_report"
_AUTO = ("tensorwise_delayed", "tensorwise_current", "rowwise")
_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What became of one linear layer.

    Attributes:
        path: Where it is in the model.
        recipe: By which it runs; empty where it keeps its format.
        reason: Why it keeps its format, or how it was chosen.
        products: Which of its products run in FP8.
        together: What it is one with: a gated MLP, layers that read the same tensor; empty where it is alone.
        plain_ms: Measured time of its products (of all layers it is one with) in its own format; `None`: not measured.
        ms: The same as chosen, with all casts.
    """

    path: str
    recipe: str = ""
    reason: str = ""
    products: tuple[str, ...] = ()
    together: str = ""
    plain_ms: float | None = None
    ms: float | None = None


@dataclass(slots=True)
class Report:
    """What became of every linear layer of a model.

    Attributes:
        layers: In the order of the model's modules.
        emulated: Whether FP8 is an emulation on this device, for numerics only.
        notes: What else there is to know.
    """

    layers: list[LayerReport]
    emulated: bool
    notes: list[str] = field(default_factory=list)

    @property
    def converted(self) -> list[LayerReport]:
        """The layers that run in FP8."""
        return [layer for layer in self.layers if layer.recipe]

    def __str__(self) -> str:
        head = f"{len(self.converted)} of {len(self.layers)} linear layers in FP8"
        lines = [head + (" (emulated on this device: right, and slow)" if self.emulated else "")]
        for layer in self.layers:
            what = f"{layer.recipe}: {', '.join(layer.products)}" if layer.recipe else "keeps its format"
            times = "" if layer.ms is None else f" [{layer.plain_ms:.3f} -> {layer.ms:.3f} ms]"
            why = f" ({layer.reason})" if layer.reason else ""
            lines.append(f"  {layer.path}: {what}{times}{why}{f', {layer.together}' if layer.together else ''}")
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True, slots=True)
class _Unit:
    """Layers that are one (of a gated MLP: gate, up, down), and how they run: without a recipe in their own format."""

    layers: list[nn.Linear]
    mlp: tuple[nn.Module, str] | None = None
    recipe: Recipe | None = None
    reason: str = ""
    choice: Choice | None = None


def convert(
    model: nn.Module,
    recipe: str | Recipe = "auto",
    *,
    example_inputs: Any = None,
    tokens: int = _TOKENS,
    allow_lm_head: bool = False,
    exclude: Collection[str] = (),
) -> nn.Module:
    """Let the linear layers of a model train in FP8, in place, and return the model.

    Its class, parameters, buffers and `state_dict` keys stay. Optimizer, loop and checkpoints stay as they are. What
    became of each layer tells `report(model)`; `restore(model)` takes everything back.

    Args:
        model: On the device where it trains.
        recipe: A recipe, its name (`RECIPES`), or `auto`: for each layer, or layers that read the same tensor, the
            recipe and the products that are the fastest at its shape on this GPU with all casts, measured and kept;
            its own format where none is at least 2 % faster. On a CPU `auto` converts nothing, and a named recipe is
            emulated, for tests of numerics. Recipes by blocks (`BLOCK_RECIPES`) are emulated on any device.
        example_inputs: What the model is called with, as `kp.optimize` takes it. A part of it is run once, without
            gradients, to see which layers read the same tensor and how many rows they have.
        tokens: Rows of a layer's input, where there are no `example_inputs`.
        allow_lm_head: Whether the layer that makes logits may run in FP8.
        exclude: Paths, or parts of paths, of layers that keep their format.

    Raises:
        InputsError: An unknown recipe.
        ModelError: The model is converted already.
    """
    if swapped(model):
        raise ModelError("the model is in FP8 already", fix="kp.precision.restore(model) first")
    if recipe in BLOCK_RECIPES:
        setattr(model, _REPORT, _emulated(model, str(recipe), allow_head=allow_lm_head, exclude=exclude))
        return model
    call = None if example_inputs is None else as_call(example_inputs)
    found = swap_model(model, recipe, run=model, call=call, tokens=tokens, allow_head=allow_lm_head, exclude=exclude)
    setattr(model, _REPORT, found)
    return model


def swapped(model: nn.Module) -> bool:
    """Return whether a model was converted."""
    return _REPORT in vars(model)


def report(model: nn.Module) -> Report:
    """Return what became of each linear layer of a converted model, those that fell back since among them.

    Raises:
        ModelError: It is not converted.
    """
    found = vars(model).get(_REPORT)
    if not isinstance(found, Report):
        raise ModelError("the model was not converted", fix="kp.precision.convert(model)")
    since = fallen(model)
    layers = [LayerReport(told.path, reason=since[told.path]) if told.path in since else told for told in found.layers]
    return replace(found, layers=layers)


def restore(model: nn.Module) -> nn.Module:
    """Give every layer of a converted model its own forward back, in place, and return the model.

    Raises:
        ModelError: It is not converted.
    """
    report(model)
    undo(model)
    vars(model).pop(_REPORT)
    return model


def undo(model: nn.Module) -> None:
    """Take FP8 off every module of a model."""
    fallen(model).clear()
    for module in model.modules():
        restore_mlp(module)
        restore_norm(module)
        if isinstance(module, nn.Linear):
            restore_linear(module)
            if EMULATED in vars(module):
                vars(module).pop(EMULATED)
                vars(module).pop("forward", None)


def _emulated(model: nn.Module, recipe: str, *, allow_head: bool, exclude: Collection[str]) -> Report:
    told = []
    for verdict in verdicts(model, allow_head=allow_head, exclude=exclude):
        if verdict.reason:
            told.append(LayerReport(verdict.path, reason=verdict.reason))
        else:
            emulate_linear(verdict.layer, recipe)
            told.append(LayerReport(verdict.path, recipe, UNVERIFIED, PRODUCTS))
    return Report(told, emulated=True, notes=[f"{recipe}: {UNVERIFIED}"])


def swap_model(
    model: nn.Module,
    recipe: str | Recipe,
    *,
    run: Callable[..., Any],
    call: Call | None,
    tokens: int = _TOKENS,
    allow_head: bool = False,
    exclude: Collection[str] = (),
) -> Report:
    """Do what `convert` does, with a call of one's own; without the mark that `report` and `restore` look for.

    Args:
        model: Changed in place.
        recipe: As of `convert`.
        run: The model's call, for observing it.
        call: What to call it with; `None` where nothing is known.
        tokens: As of `convert`.
        allow_head: As `allow_lm_head`.
        exclude: As of `convert`.
    """
    auto = recipe == "auto"
    named = [RECIPES[name] for name in _AUTO] if auto else [recipe_named(recipe)]
    found = list(verdicts(model, allow_head=allow_head, exclude=exclude))
    layers = [v.layer for v in found if not v.reason]
    device = layers[0].weight.device if layers else torch.device("cpu")
    norms = _norms(model)
    observed = None if call is None or not layers else observe(run, call, layers, [m for m, _ in norms.values()])
    seen = observed if isinstance(observed, Seen) else None
    units = _units(model, layers, seen, named[0])
    notes = _notes(observed, tokens if auto else None)
    if auto:
        units = [part for unit in units for part in _chosen(unit, seen, tokens, named)]
    else:
        units = [replace(unit, recipe=named[0]) for unit in units]
    for unit in units:
        _swap(unit)
    if seen is not None:
        _connect(units, seen, norms)
    return Report(_tell(found, units), emulated(device) and not auto, notes)


def _notes(observed: Seen | str | None, tokens: int | None) -> list[str]:
    notes = []
    if isinstance(observed, str):
        notes.append(f"the model did not run on its example inputs ({observed}): no layers share a cast of their input")
    if not isinstance(observed, Seen) and tokens is not None:
        notes.append(f"measured at {tokens} rows, for what the model is called with is not known")
    return notes


def _units(model: nn.Module, layers: list[nn.Linear], seen: Seen | None, recipe: Recipe) -> list[_Unit]:
    """Return the layers as they can be one: gated MLPs first, then those that read the same tensor."""
    allowed = {id(m) for m in layers}
    units: list[_Unit] = []
    for module in model.modules():
        options = None if "forward" in vars(module) else gated_mlp_options(module, gated_mlp_reference)
        if options is not None:
            gate, up, down = (getattr(module, name) for name in options["names"])
            if {id(gate), id(up), id(down)} <= allowed and fusible(recipe, (gate, up, down)):
                units.append(_Unit([gate, up, down], (module, options["activation"])))
    taken = {id(m) for unit in units for m in unit.layers}
    for group in [] if seen is None else seen.groups:
        rest = [m for m in group if id(m) not in taken]
        if len(rest) > 1 and alike(rest):
            units.append(_Unit(rest))
    taken = {id(m) for unit in units for m in unit.layers}
    return units + [_Unit([m]) for m in layers if id(m) not in taken]


def grouped(model: nn.Module, layers: list[nn.Linear], seen: Seen | None, recipe: Recipe) -> list[list[nn.Linear]]:
    """Return the layers as they would run: those that read the same tensor together, of a gated MLP gate and up."""
    groups = []
    for unit in _units(model, layers, seen, recipe):
        groups += [unit.layers] if unit.mlp is None else [unit.layers[:2], unit.layers[2:]]
    return groups


def _chosen(unit: _Unit, seen: Seen | None, tokens: int, recipes: Sequence[Recipe]) -> list[_Unit]:
    """Return a unit with the recipe and products that pay, or its parts where they do not pay alike."""
    first = unit.layers[0].weight.device
    for layer in unit.layers:
        skip = unsupported(first, layer.in_features, layer.out_features)
        if skip is not None:
            return [replace(unit, mlp=None, reason=skip.reason)]
    if unit.mlp is None:
        choice = _choice(unit.layers, seen, tokens, recipes)
        reason = "" if choice.recipe is not None else "its own format is as fast"
        return [replace(unit, recipe=choice.recipe, reason=reason, choice=choice)]
    parts = [_chosen(_Unit(part), seen, tokens, recipes)[0] for part in (unit.layers[:2], unit.layers[2:])]
    both = [part.recipe for part in parts]
    choices = [part.choice for part in parts if part.choice is not None]
    if both[0] is None or both[0] != both[1] or not fusible(both[0], (*unit.layers,)):  # type: ignore[arg-type]
        return parts
    total = Choice(both[0], sum(c.plain_ms for c in choices), sum(c.ms for c in choices))
    return [replace(unit, recipe=both[0], choice=total)]


def _choice(layers: list[nn.Linear], seen: Seen | None, tokens: int, recipes: Sequence[Recipe]) -> Choice:
    first = layers[0]
    rows = tokens if seen is None else seen.rows.get(id(first), tokens)
    dtype = str(first.weight.dtype).removeprefix("torch.")
    shape = LayerShape(rows, first.in_features, sum(m.out_features for m in layers), dtype)
    return choose(shape, recipes, first.weight.device)


def _swap(unit: _Unit) -> None:
    if unit.recipe is None:
        return
    if unit.mlp is not None:
        module, activation = unit.mlp
        gate, up, down = unit.layers
        swap_mlp(module, (gate, up, down), activation, unit.recipe)
    else:
        swap_linears(unit.layers, unit.recipe)


def _norms(model: nn.Module) -> dict[int, tuple[nn.Module, dict[str, Any]]]:
    """Return the RMSNorms of a model that compute by their class, with what they are computed with, by id."""
    found = {}
    for module in model.modules():
        options = None if "forward" in vars(module) else rms_norm_options(module, _rms_norm)
        if options is not None:
            found[id(module)] = (module, options)
    return found


def _rms_norm(*args: Any, **kwargs: Any) -> torch.Tensor:
    return rms_norm_reference(*args, **kwargs)[0]


def _connect(units: list[_Unit], seen: Seen, norms: dict[int, tuple[nn.Module, dict[str, Any]]]) -> None:
    """Tell the sites of units where what they read comes from."""
    for unit in units:
        site = None if unit.recipe is None else site_of(unit.layers[0])
        if site is None:
            continue
        site.kept = id(unit.layers[0]) in seen.kept
        maker = seen.makers.get(id(unit.layers[0]))
        if maker is not None and "forward" not in vars(maker) and not site.recipe.by_row:
            options = norms[id(maker)][1]
            site.normed = watch_norm(maker, options["eps"], options["weight_offset"])


def _tell(found: list[Verdict], units: list[_Unit]) -> list[LayerReport]:
    paths = {id(v.layer): v.path for v in found}
    unit_of = {id(m): unit for unit in units for m in unit.layers}
    told = []
    for verdict in found:
        unit = unit_of.get(id(verdict.layer))
        if unit is None:
            told.append(LayerReport(verdict.path, reason=verdict.reason))
            continue
        others = [paths[id(m)] for m in unit.layers if m is not verdict.layer]
        kind = "a gated MLP" if unit.mlp is not None else "one"
        together = f"{kind} with {', '.join(others)}" if others and unit.recipe is not None else ""
        products = () if unit.recipe is None else tuple(p for p in PRODUCTS if getattr(unit.recipe, p).float8)
        times = (None, None) if unit.choice is None else (unit.choice.plain_ms, unit.choice.ms)
        name = "" if unit.recipe is None else unit.recipe.name
        told.append(LayerReport(verdict.path, name, unit.reason, products, together, *times))
    return told
