# mypy: disable-error-code="no-untyped-call"
"""Whether modules compute one function of their inputs and weights: by their attributes, else by what they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from kernel_pytorch.advanced_memory.twice import RANDOM, Plainly, kind_of

__all__ = ["difference"]

_PLAIN = (bool, int, float, complex, str, bytes, tuple, type(None), torch.dtype)
_HELD = {"_parameters", "_buffers", "_modules", "_compiled_call_impl"}


def difference(modules: Sequence[nn.Module], given: Sequence[Any], spec: Any) -> str:
    """Return what keeps modules of one structure from being one function; empty where nothing does.

    One that differs from the first in an attribute (the number of its layer, say) is traced with the same inputs, and
    must be made of the same operators with the same constants. Nothing is computed.

    Args:
        modules: Of one structure.
        given: The leaves of `(args, kwargs)` that they are called with; only shapes and dtypes of tensors count.
        spec: Its structure.
    """
    objects = [type(x).__name__ for x in given if not isinstance(x, (torch.Tensor, torch.device, *_PLAIN))]
    if objects:
        return f"the blocks are given a {objects[0]}, which they may write (use_cache=False, if it is a cache)"
    if any(_hooks(m) for module in modules for m in module.modules()):
        return "a block has hooks, which a loop would not call for each"
    first = _operators(modules[0], given, spec)
    if isinstance(first, str):
        return first
    for i, module in enumerate(modules):
        if _same_attributes(modules[0], module):
            continue
        other = _operators(module, given, spec)
        if isinstance(other, str):
            return other
        if other != first:
            return f"block {i} computes something else than the first: {_first_difference(first, other)}"
    return ""


def _hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)  # noqa: SLF001


def _same_attributes(one: nn.Module, other: nn.Module) -> bool:
    for a, b in zip(one.modules(), other.modules(), strict=True):
        mine, its = vars(a), vars(b)
        if type(a) is not type(b) or mine.keys() != its.keys():
            return False
        if not all(_same(mine[key], its[key]) for key in mine if key not in _HELD):
            return False
    return True


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, _PLAIN):
        return bool(one == other)
    return isinstance(one, dict | list | set) and not one and not other


def _operators(module: nn.Module, given: Sequence[Any], spec: Any) -> list[Any] | str:
    """Return the operators that a module runs and what they take, or why they cannot be those of a loop."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    places = [i for i, leaf in enumerate(given) if isinstance(leaf, torch.Tensor)]
    with _disable_current_modes(), torch._C.DisableTorchFunction(), FakeTensorMode(allow_non_fake_inputs=True):  # noqa: SLF001
        tensors = [
            torch.empty(t.shape, dtype=t.dtype, device="cpu") for t in (*state.values(), *(given[i] for i in places))
        ]

        def run(*flat: torch.Tensor) -> Any:
            leaves = list(given)
            for place, tensor in zip(places, flat[len(state) :], strict=True):
                leaves[place] = tensor
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            held = dict(zip((f"module.{name}" for name in state), flat, strict=False))
            with torch.no_grad():
                return torch.func.functional_call(Plainly(module), held, args, kwargs)

        try:
            graph = make_fx(run)(*tensors)
        except Exception as error:  # noqa: BLE001  a foreign module may raise anything on values that are not there
            return (
                f"a block cannot be traced: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
    if any(kind_of(node.target) == RANDOM for node in graph.graph.nodes):
        return "a block draws random numbers (dropout), which every step of a loop would have to draw anew"
    return _listed(graph)


def _listed(graph: fx.GraphModule) -> list[Any]:
    numbers = {node: i for i, node in enumerate(graph.graph.nodes)}

    def plain(leaf: Any) -> Any:
        return ("node", numbers[leaf]) if isinstance(leaf, fx.Node) else repr(leaf)

    listed: list[Any] = []
    for node in graph.graph.nodes:
        target: Any = str(node.target)
        if node.op == "get_attr":
            constant = getattr(graph, str(node.target))
            target = constant.tolist() if type(constant) is torch.Tensor else id(constant)
        elif node.op == "placeholder":
            target = ""
        listed.append((node.op, target, *(plain(x) for x in pytree.tree_leaves((node.args, node.kwargs)))))
    return listed


def _first_difference(one: list[Any], other: list[Any]) -> str:
    a, b = next(((a, b) for a, b in zip(one, other, strict=False) if a != b), (one[-1], other[-1]))
    given = [(x, y) for x, y in zip(a[2:], b[2:], strict=False) if x != y and isinstance(x, str)]
    if a[1] == b[1] and given:
        return f"{given[0][0]} and {given[0][1]} are given to {a[1]}"
    return f"{a[1]} and {b[1]}"
