"""What a model's linear layers read, seen by running it.

Which of them share an input, how many rows it has, which module made it, and whether it is kept until the backward for
others' sake.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from kernel_pytorch.core.workload import Call

__all__ = ["Seen", "alike", "observe"]

_SAMPLES, _TOKENS = 1, 128


@dataclass(slots=True)
class Seen:
    """What layers read.

    Attributes:
        groups: Layers that were called once each, with the very same tensor; each layer in one group.
        rows: Rows of each layer's input in the whole call, by id of the layer.
        makers: Of the modules that were watched, the one whose result a layer read, by id of the layer; called once.
        kept: Ids of layers whose input something before them had kept for its backward, as attention keeps its result.
    """

    groups: list[list[nn.Linear]] = field(default_factory=list)
    rows: dict[int, int] = field(default_factory=dict)
    makers: dict[int, nn.Module] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Notes:
    """What one run showed; what is noted stays alive until its end, so that no memory is used twice."""

    inputs: dict[int, list[torch.Tensor]]
    results: list[tuple[nn.Module, Any]] = field(default_factory=list)
    saved: dict[int, torch.Tensor] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)

    def forget(self) -> None:
        """Let go of every tensor: a graph keeps what its hooks know, and these notes would keep the graph for ever."""
        for tensors in (self.inputs, self.results, self.saved):
            tensors.clear()


def observe(
    run: Callable[..., Any], call: Call, layers: Collection[nn.Linear], makers: Collection[nn.Module] = ()
) -> Seen | str:
    """Run a model on a part of a call (one sample, 128 tokens) and return what its layers read.

    Args:
        run: The model's call. It runs forwards only, and under its own random state.
        call: Arguments.
        layers: Whom to watch.
        makers: Modules of which to know whether layers read their results.

    Returns:
        What it raised, in one line, where the model runs neither on the part nor on the whole.
    """
    why = "there is nothing to call it with"
    for given, share in _parts(call):
        notes = _watched(run, given, layers, makers)
        if not isinstance(notes, str):
            seen = [(m, notes.inputs[id(m)]) for m in layers if notes.inputs[id(m)]]
            rows = {id(m): round(sum(_rows(x) for x in xs) / share) for m, xs in seen}
            found = Seen(_groups(seen), rows, _makers(seen, notes.results), notes.kept)
            notes.forget()
            return found
        why = notes
    return why


def alike(layers: Collection[nn.Linear]) -> bool:
    """Return whether layers can be one: equal inputs, and weights of one dtype that all learn or are all frozen."""
    kinds = {(m.in_features, m.weight.dtype, m.weight.device, m.weight.requires_grad) for m in layers}
    return len(kinds) == 1 and len({id(m.weight) for m in layers}) == len(layers)


def _parts(call: Call) -> Iterator[tuple[Call, float]]:
    """Yield a small part of a call with its share of the elements, then the whole."""
    leaves, spec = pytree.tree_flatten((call.args, dict(call.kwargs)))
    tensors = [x for x in leaves if isinstance(x, torch.Tensor) and x.dim()]
    if tensors:
        samples, length = len(tensors[0]), tensors[0].shape[1] if tensors[0].dim() == 2 else 0

        def cut(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or not x.dim() or len(x) != samples:
                return x
            part = x[:_SAMPLES]
            return part[:, :_TOKENS] if x.dim() >= 2 and length and x.shape[1] == length else part

        args, kwargs = pytree.tree_unflatten([cut(x) for x in leaves], spec)
        yield Call(args, kwargs), cut(tensors[0]).numel() / max(tensors[0].numel(), 1)
    yield call, 1.0


def _watched(
    run: Callable[..., Any], call: Call, layers: Collection[nn.Linear], makers: Collection[nn.Module]
) -> _Notes | str:
    notes = _Notes({id(m): [] for m in layers})

    def reads(module: nn.Module, args: tuple[Any, ...]) -> None:
        notes.inputs[id(module)].append(args[0])
        if args[0].untyped_storage().data_ptr() in notes.saved:
            notes.kept.add(id(module))

    def made(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        del args
        notes.results.append((module, result))

    def saves(tensor: torch.Tensor) -> torch.Tensor:
        # Detached: an operator that keeps its own result would be kept by it, by a circle that nobody collects.
        notes.saved[tensor.untyped_storage().data_ptr()] = tensor = tensor.detach()
        return tensor

    handles = [m.register_forward_pre_hook(reads) for m in layers] + [m.register_forward_hook(made) for m in makers]
    try:
        with (
            torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(saves, lambda tensor: tensor),
            torch.random.fork_rng(),
        ):  # fmt: skip
            run(*call.args, **call.kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        notes.forget()
        return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
    finally:
        for handle in handles:
            handle.remove()
    return notes


def _makers(
    seen: list[tuple[nn.Linear, list[torch.Tensor]]], results: list[tuple[nn.Module, Any]]
) -> dict[int, nn.Module]:
    calls = Counter(id(module) for module, _ in results)
    made = {id(result): module for module, result in results if calls[id(module)] == 1}
    return {id(m): made[id(xs[0])] for m, xs in seen if len(xs) == 1 and id(xs[0]) in made}


def _groups(seen: list[tuple[nn.Linear, list[torch.Tensor]]]) -> list[list[nn.Linear]]:
    by_input: dict[int, list[nn.Linear]] = {}
    for module, xs in seen:
        if len(xs) == 1:
            by_input.setdefault(id(xs[0]), []).append(module)
    return list(by_input.values()) + [[module] for module, xs in seen if len(xs) > 1]


def _rows(x: torch.Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)
