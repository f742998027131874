"""What a model's linear layers read, seen by running it: which of them share an input, and how many rows that has."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
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
    """

    groups: list[list[nn.Linear]] = field(default_factory=list)
    rows: dict[int, int] = field(default_factory=dict)


def observe(run: Callable[..., Any], call: Call, layers: Collection[nn.Linear]) -> Seen | str:
    """Run a model on a part of a call (one sample, 128 tokens) and return what its layers read.

    Args:
        run: The model's call. It runs without gradients and under its own random state.
        call: Arguments.
        layers: Whom to watch.

    Returns:
        What it raised, in one line, where the model runs neither on the part nor on the whole.
    """
    why = "there is nothing to call it with"
    for given, share in _parts(call):
        seen = _watched(run, given, layers)
        if not isinstance(seen, str):
            return Seen(_groups(seen), {id(m): round(sum(_rows(x) for x in xs) / share) for m, xs in seen})
        why = seen
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
    run: Callable[..., Any], call: Call, layers: Collection[nn.Linear]
) -> list[tuple[nn.Linear, list[torch.Tensor]]] | str:
    inputs: dict[int, list[torch.Tensor]] = {id(m): [] for m in layers}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[id(module)].append(args[0])

    with _hooked(layers, note), torch.no_grad(), torch.random.fork_rng():
        try:
            run(*call.args, **call.kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
    return [(m, inputs[id(m)]) for m in layers if inputs[id(m)]]


@contextmanager
def _hooked(layers: Collection[nn.Linear], note: Callable[..., None]) -> Iterator[None]:
    handles = [m.register_forward_pre_hook(note) for m in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _groups(seen: list[tuple[nn.Linear, list[torch.Tensor]]]) -> list[list[nn.Linear]]:
    by_input: dict[int, list[nn.Linear]] = {}
    for module, xs in seen:
        if len(xs) == 1:
            by_input.setdefault(id(xs[0]), []).append(module)
    return list(by_input.values()) + [[module] for module, xs in seen if len(xs) > 1]


def _rows(x: torch.Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)
