# mypy: disable-error-code="no-untyped-call"
"""A computation that runs in the forward and again in the backward, and what the second run takes from the first.

Random numbers are kept, never drawn again, so that no generator state has to travel into a graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from kernel_pytorch.core.program import plain_call
from kernel_pytorch.errors import CandidateError

__all__ = ["RANDOM", "Plainly", "Results", "Twice", "kind_of", "master"]

RANDOM = "random"
_KEPT = object()
_XLA, _LANES = ("tpu", "xla"), 128
"""Where the last dimension of an array is padded to a multiple of 128 in memory."""
_PRODUCTS = {"linear", "mm", "addmm", "bmm", "baddbmm", "convolution", "_grouped_mm", "_scaled_mm"}
_DRAWS = {
    "native_dropout",
    "bernoulli",
    "bernoulli_",
    "rand",
    "randn",
    "rand_like",
    "randn_like",
    "randint",
    "uniform_",
    "normal_",
    "exponential_",
    "multinomial",
    "randperm",
}


def kind_of(op: Any) -> str:
    """Return the kind under which an aten operator's results can be kept: `attention`, `product`, `random` or empty."""
    name = str(getattr(op, "overloadpacket", op)).rpartition(".")[2]
    if name in _PRODUCTS:
        return "product"
    if name in _DRAWS:
        return RANDOM
    return "attention" if "scaled_dot_product" in name and not name.endswith("_backward") else ""


class Results(TorchDispatchMode):
    """Names the results of the operators of one call, `product:0`, `product:1`, `attention:0` ..., in order.

    Args:
        visit: Called as `visit(name, op, args, kwargs, run)` for each operator that has a kind; returns its results,
            by `run()` or otherwise.
    """

    def __init__(self, visit: Callable[..., Any]) -> None:
        super().__init__()
        self.visit = visit
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        kind = kind_of(func)
        if not kind:
            return func(*args, **kwargs)
        index = self.counts.get(kind, 0)
        self.counts[kind] = index + 1
        return self.visit(f"{kind}:{index}", func, args, kwargs, lambda: func(*args, **kwargs))


def master(parameter: torch.Tensor) -> torch.Tensor:
    """Return the leaf that a parameter is a cast of, to be cast again; else the parameter.

    A step that computes in bfloat16 by casting its float32 weights would otherwise keep the copies until the backward.
    """
    node = parameter.grad_fn
    if node is None or node.name() != "ToCopyBackward0":
        return parameter
    leaf = getattr(node.next_functions[0][0], "variable", None)
    return parameter if leaf is None or leaf.shape != parameter.shape else leaf


class Plainly(nn.Module):
    """Calls a module by its own uncompiled call, so that a call that is routed elsewhere does not come back."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.train(module.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return plain_call(self.module)(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class _Packed:
    """Heads of a result side by side, `[batch, rows, heads * width]`: narrow last dimensions are padded in memory."""

    tensor: torch.Tensor
    heads: int


def _packed_again(leaves: Iterable[Any], heads: Any) -> _Packed:
    (tensor,) = leaves
    return _Packed(tensor, heads)


pytree.register_pytree_node(_Packed, lambda p: ([p.tensor], p.heads), _packed_again)


def _pack(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor) and leaf.dim() == 4 and leaf.device.type in _XLA and leaf.shape[-1] % _LANES:
        return _Packed(leaf.transpose(1, 2).flatten(2), leaf.shape[1])
    return leaf


def _unpack(leaf: Any) -> Any:
    return leaf.tensor.unflatten(2, (leaf.heads, -1)).transpose(1, 2) if isinstance(leaf, _Packed) else leaf


def _inner(leaf: Any) -> Any:
    """Return what PyTorch/XLA's functionalization wraps: results are named below it, and taken over there."""
    if not isinstance(leaf, torch.Tensor) or leaf.device.type != "xla" or not torch._is_functional_tensor(leaf):  # noqa: SLF001
        return leaf
    torch._sync(leaf)  # type: ignore[attr-defined]  # noqa: SLF001
    return torch._from_functional_tensor(leaf)  # noqa: SLF001


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, _Packed)


def _is_random(name: str) -> bool:
    return name.startswith(f"{RANDOM}:")


def _versions(value: Any) -> list[int]:
    return [leaf._version for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]  # noqa: SLF001


class Twice:
    """One call: what runs, what it keeps, and the structure of its result.

    Args:
        run: Takes tensors and returns any tree.
        keep: Names of results that the second run takes over (`Results`); random numbers always are.
        buffers: What `run` must not write, for it would write it twice.

    Attributes:
        spec: Structure of the result, once it has run.
    """

    def __init__(
        self, run: Callable[[list[torch.Tensor]], Any], keep: frozenset[str], buffers: Collection[torch.Tensor]
    ) -> None:
        self.run = run
        self.keep = keep
        self.buffers = buffers
        self.spec: Any = None
        self.kept_spec: Any = None
        self.kept_leaves: list[Any] = []
        self.packed: set[str] = set()
        self.surroundings = _Surroundings()

    def _keeps(self, name: str) -> bool:
        return name in self.keep or _is_random(name)

    def first(self, tensors: list[torch.Tensor]) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
        """Run and return the leaves of the result, and the tensors kept.

        Raises:
            CandidateError: It wrote a buffer.
        """
        kept: dict[str, Any] = {}
        versions: dict[str, list[int]] = {}

        def visit(name: str, op: Any, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
            del op, args, kwargs
            value = run()
            if self._keeps(name):
                # Random numbers are scaled in place by who drew them, and cannot be computed again.
                kept[name] = pytree.tree_map(torch.clone, value) if _is_random(name) else value
                versions[name] = _versions(kept[name])
            return value

        before = _versions(list(self.buffers))
        with Results(visit):
            result = self.run(tensors)
        if _versions(list(self.buffers)) != before:
            raise CandidateError(
                "a block writes its buffers (running statistics, say); recomputed, it would write them twice"
            )
        kept = {name: value for name, value in kept.items() if _versions(value) == versions[name]}
        self.packed = {name for name in kept if name.startswith("attention:")}
        kept |= {name: pytree.tree_map(_pack, kept[name]) for name in self.packed}
        leaves, self.spec = pytree.tree_flatten(result)
        values, self.kept_spec = pytree.tree_flatten(kept)
        self.kept_leaves = [_KEPT if isinstance(v, torch.Tensor) else v for v in values]
        return tuple(leaves), [v for v in values if isinstance(v, torch.Tensor)]

    def second(self, tensors: list[torch.Tensor], kept: list[torch.Tensor]) -> list[Any]:
        """Run again, taking kept results instead of computing them, and return the leaves of the result."""
        left = iter(kept)
        values = [next(left) if value is _KEPT else value for value in self.kept_leaves]
        known = pytree.tree_unflatten(values, self.kept_spec)
        known |= {name: pytree.tree_map(_unpack, known[name], is_leaf=_is_packed) for name in self.packed}
        known = pytree.tree_map(_inner, known)

        def visit(name: str, op: Any, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
            del kwargs
            if name not in known:
                return run()
            return args[0].copy_(known[name]) if str(op.overloadpacket).endswith("_") else known[name]

        with self.surroundings.again(), Results(visit):
            result = self.run(tensors)
        return pytree.tree_leaves(result)


class _Surroundings:
    """What holds around a forward, for its repetition in the backward: autocast, and modes that change functions."""

    def __init__(self) -> None:
        self.casts = []
        for kind in ("cpu", "cuda", "xpu", "tpu", "xla"):
            with contextlib.suppress(RuntimeError):
                if torch.is_autocast_enabled(kind):
                    self.casts.append((kind, torch.get_autocast_dtype(kind)))
        self.modes = _function_modes()

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        active = {id(mode) for mode in _function_modes()}
        with contextlib.ExitStack() as stack:
            for kind, dtype in self.casts:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            for mode in self.modes:
                if id(mode) not in active:
                    stack.enter_context(mode)
            yield


def _function_modes() -> list[Any]:
    return list(torch.overrides._get_current_function_mode_stack())  # noqa: SLF001
