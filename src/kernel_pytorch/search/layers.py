"""Time by layer before and after: each kind of layer alone, at the inputs it sees inside the model.

Repeated blocks are timed once and counted (`encoder.layer.* x6`). A compiler may fuse across the borders of layers,
so the parts need not sum to the whole; they say where the time went.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kernel_pytorch.catalog import apply_candidate
from kernel_pytorch.core.describe import fingerprint
from kernel_pytorch.core.program import begin, clone_call, clone_model, ship
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import Candidate, Mode, Step
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.search.bench import Bench

__all__ = ["layer_times", "layers_of"]

_SAMPLES = 5
_MOST_LAYERS = 6


def layers_of(model: nn.Module) -> dict[str, list[str]]:
    """Return the layers worth telling apart: module paths by label, equal repeated blocks under one label.

    Descends from the root until there are at least two children with parameters; a `ModuleList` or `Sequential` is
    replaced by its members.
    """
    paths = [("", model)]
    while len(paths) < 2:
        path, module = paths[0]
        inner = [(f"{path}.{n}".strip("."), c) for n, c in module.named_children() if any(True for _ in c.parameters())]
        if not inner:
            break
        paths = inner
    flat: list[tuple[str, nn.Module]] = []
    for path, module in paths:
        flat.extend(_members(path, module))
    groups: dict[tuple[str, str], list[str]] = {}
    for path, module in flat:
        groups.setdefault((path.rpartition(".")[0], fingerprint(module)), []).append(path)
    labels = {}
    for (parent, _), members in groups.items():
        labels[f"{parent}.* x{len(members)}".strip(".") if len(members) > 1 else members[0]] = members
    return labels


def _members(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    if isinstance(module, nn.ModuleList | nn.Sequential):
        return [pair for n, c in module.named_children() for pair in _members(f"{path}.{n}", c)]
    lists = [(n, c) for n, c in module.named_children() if isinstance(c, nn.ModuleList | nn.Sequential) and len(c) > 1]
    if lists and len(lists) == len(list(module.named_children())):
        return [pair for n, c in lists for pair in _members(f"{path}.{n}", c)]
    return [(path, module)]


def layer_times(bench: Bench, candidate: Candidate) -> Mapping[str, tuple[float, float]]:
    """Return milliseconds of each layer before and after the candidate, times its count; inference only.

    A step that does not fit a layer alone (there is nothing to pack in a normalisation) leaves it as it is.
    """
    if bench.training:
        return {}
    case = next(iter(bench.calls))
    labels = dict(list(layers_of(bench.model).items())[:_MOST_LAYERS])
    seen = _captured(bench, {members[0] for members in labels.values()}, bench.calls[case])
    times: dict[str, tuple[float, float]] = {}
    for label, members in labels.items():
        if members[0] in seen:
            layer = bench.model.get_submodule(members[0])
            before, after = _pair(bench, layer, seen[members[0]], candidate)
            times[label] = (before * len(members), after * len(members))
    return times


def _captured(bench: Bench, paths: set[str], call: Call) -> dict[str, Call]:
    seen: dict[str, Call] = {}

    def hook(path: str) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.setdefault(path, clone_call(Call(args, kwargs)))

        return keep

    handles = [
        bench.model.get_submodule(path).register_forward_pre_hook(hook(path), with_kwargs=True) for path in paths
    ]
    try:
        with torch.no_grad():
            bench.model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _applied(bench: Bench, layer: nn.Module, call: Call, candidate: Candidate) -> Program:
    """Return a copy of a layer with the steps that fit it."""
    try:
        return apply_candidate(begin(clone_model(layer), Mode.INFERENCE, {"main": call}), candidate, bench.transforms)
    except CandidateError:
        fitting = [s for s in candidate.steps if _fits(bench, layer, call, s)]
        if len(fitting) == len(candidate.steps):
            raise
        return _applied(bench, layer, call, Candidate(tuple(fitting)))


def _fits(bench: Bench, layer: nn.Module, call: Call, step: Step) -> bool:
    try:
        apply_candidate(begin(clone_model(layer), Mode.INFERENCE, {"main": call}), Candidate((step,)), bench.transforms)
    except CandidateError:
        return False
    return True


def _pair(bench: Bench, layer: nn.Module, call: Call, candidate: Candidate) -> tuple[float, float]:
    shipped = ship(_applied(bench, layer, call, candidate), layer)
    small = replace(bench, calls={"main": call})
    before, after = small.step(layer, None, "main"), small.step(shipped, None, "main")
    after(), after(), before()
    samples = [(bench.manager.time_ms(before), bench.manager.time_ms(after)) for _ in range(_SAMPLES)]
    return statistics.median(b for b, _ in samples), statistics.median(a for _, a in samples)
