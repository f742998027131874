"""Answer the calls of `F.scaled_dot_product_attention` that a model makes otherwise than PyTorch does.

The function is replaced where models find it by one that asks the routes of the current thread, of which there are none
outside of the call of a program. Dynamo traces it without a graph break. (Tried: a `TorchFunctionMode` does the same,
but torch 2.13 cannot trace `Tensor.unflatten` and its like under one, and it hides what `nn.MultiheadAttention` calls.)
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kernel_pytorch.core.protocols import Program

__all__ = [
    "DETOUR",
    "HEADS",
    "SDPA",
    "Place",
    "Route",
    "Using",
    "alike",
    "always",
    "detour",
    "install",
    "pattern_of",
    "rerouted",
    "routes_by_thread",
    "using",
    "with_globals",
]

Route = Callable[..., torch.Tensor]
"""`route(query, key, value, options, rest)`: options are all other arguments of SDPA by name, and `rest(query, key,
value, options)` asks the routes entered before, in the end SDPA."""


def with_globals(function: Any, **names: Any) -> Any:
    """Return a copy of a Python function that finds other objects under some of its global names."""
    scope = {**function.__globals__, **names}
    scope.pop("__name__", None)  # by it Dynamo would look the names up in the original module
    copy = type(function)(function.__code__, scope, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def routes_by_thread() -> Any:
    """Return where the routes of each thread are kept: an object with the tuple `stack`."""
    import threading

    class Routes(threading.local):
        stack = ()

    return Routes()


def detour(routes: Any) -> Callable[..., torch.Tensor]:
    """Return a function that takes the place of SDPA and asks the routes, the one entered last first."""
    sdpa = nn.functional.scaled_dot_product_attention

    def ask(stack: Any, query: Any, key: Any, value: Any, options: dict[str, Any]) -> Any:
        if not stack:
            return sdpa(query, key, value, **options)
        return stack[-1](query, key, value, options, lambda q, k, v, o: ask(stack[:-1], q, k, v, o))

    def scaled_dot_product_attention(  # noqa: PLR0917  the signature of SDPA
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002
        scale: Any = None,
        enable_gqa: bool = False,  # noqa: FBT001, FBT002
    ) -> Any:
        options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        return ask(routes.stack, query, key, value, {**options, "enable_gqa": enable_gqa})

    return scaled_dot_product_attention


class Using:
    """Sends this thread's calls of SDPA, where it was replaced, to a route.

    No context manager, for Dynamo enters none that was made outside of what it traces.
    """

    def __init__(self, routes: Any, route: Any) -> None:
        self.routes = routes
        self.route = route

    def enter(self) -> None:
        """Begin."""
        self.routes.stack = (*self.routes.stack, self.route)

    def leave(self) -> None:
        """End."""
        self.routes.stack = self.routes.stack[:-1]


SDPA = nn.functional.scaled_dot_product_attention
_ROUTES = routes_by_thread()
DETOUR = detour(_ROUTES)
HEADS = nn.functional.multi_head_attention_forward
# Dynamo takes the original for one operator, and would not see what it calls.
_HEADS_BY_DETOUR = with_globals(HEADS, scaled_dot_product_attention=DETOUR)
_installed: Counter[tuple[int, str]] = Counter()
_lock = threading.Lock()

Place = tuple[dict[str, Any], str]
"""A namespace and the name by which it holds SDPA."""


def using(route: Route) -> Using:
    """Return what sends the calls of the replaced SDPA to a route."""
    return Using(_ROUTES, route)


def install(program: Program, places: Sequence[Place]) -> None:
    """Replace SDPA where models find it, until each step that did is undone or its model is gone."""
    functions = vars(nn.functional)
    swaps = [*((*place, SDPA, DETOUR) for place in places), (functions, HEADS.__name__, HEADS, _HEADS_BY_DETOUR)]
    with _lock:
        for namespace, name, _, new in swaps:
            _installed[id(namespace), name] += 1
            namespace[name] = new

    def remove() -> None:
        with _lock:
            for namespace, name, old, _ in swaps:
                _installed[id(namespace), name] -= 1
                if not _installed[id(namespace), name]:
                    namespace[name] = old

    program.undo.append(weakref.finalize(program.model, remove))


def pattern_of(value: Any) -> tuple[str, Any]:
    """Return what a value looks like: rank of a tensor, parts of a container, a plain value itself, else its class."""
    if isinstance(value, torch.Tensor):
        return ("tensor", value.dim())
    if isinstance(value, tuple | list):
        return ("sequence", [pattern_of(item) for item in value])
    if isinstance(value, Mapping):
        return ("mapping", {key: pattern_of(item) for key, item in value.items()})
    if isinstance(value, bool | int | float | str | type(None)):
        return ("value", value)
    return ("class", type(value))


def alike(pattern: Any, value: Any) -> bool:
    """Return whether a value looks like a pattern (in the plain words that Dynamo traces)."""
    kind, what = pattern
    if kind == "tensor":
        return isinstance(value, torch.Tensor) and value.dim() == what
    if kind == "value":
        return value is None if what is None else type(value) is type(what) and bool(value == what)
    if kind == "class":
        return type(value) is what
    if kind == "sequence":
        same = isinstance(value, (tuple, list)) and len(value) == len(what)
        for one, item in zip(what, value) if same else ():  # noqa: B905
            same = same and alike(one, item)
        return same
    same = not isinstance(value, torch.Tensor) and hasattr(value, "keys") and len(value) == len(what)
    for name in what if same else ():
        same = same and name in value and alike(what[name], value[name])
    return same


def rerouted(inner: Callable[..., Any], mode: Any, patterns: Sequence[tuple[Any, Any]]) -> Callable[..., Any]:
    """Return `inner`, called under `mode` where its arguments look like one of the patterns."""

    def run(*args: Any, **kwargs: Any) -> Any:
        fits = False
        for positional, named in patterns:
            fits = fits or (alike(positional, args) and alike(named, kwargs))
        if not fits:
            return inner(*args, **kwargs)
        mode.enter()
        try:
            return inner(*args, **kwargs)
        finally:
            mode.leave()

    return run


def always(inner: Callable[..., Any], mode: Any) -> Callable[..., Any]:
    """Return `inner`, always called under `mode`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        mode.enter()
        try:
            return inner(*args, **kwargs)
        finally:
            mode.leave()

    return run
