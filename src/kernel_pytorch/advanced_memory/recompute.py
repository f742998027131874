# mypy: disable-error-code="no-untyped-call"
"""Call a module and keep its inputs and a few chosen results; its backward computes the rest again.

The method is activation checkpointing (Chen et al. 2016, arXiv:1604.06174) with a choice of what to keep (selective
recomputation, Korthikanti et al. 2022, arXiv:2205.05198). Two things differ from `torch.utils.checkpoint`: the inputs
of the second computation and the gradient that asks for it pass one barrier together, so that a compiler of the whole
step neither merges it with the first nor starts it before it is needed; and random numbers are kept, never drawn
again, so that no generator state has to travel into a graph.
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

from kernel_pytorch.advanced_memory.barrier import hold_apart
from kernel_pytorch.core.program import plain_call
from kernel_pytorch.errors import CandidateError

__all__ = ["RANDOM", "Recomputed", "Results", "kind_of", "recompute"]

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


def recompute(module: nn.Module, keep: Collection[str], *args: Any, **kwargs: Any) -> Any:
    """Return `Recomputed(module, keep)(*args, **kwargs)`."""
    return Recomputed(module, keep)(*args, **kwargs)


class Recomputed:
    """A call of a module; between forward and backward only its inputs and what is kept stay in memory.

    Gradients are those of the plain call: equal operators on equal values.

    Args:
        module: Any module whose call is a function of its arguments, parameters and buffers. Its own (uncompiled) call
            runs, hooks included, once in the forward and once in the backward.
        keep: Names of results to keep (`attention:0`, `product:2`; see `Results`), of one call. What draws random
            numbers is kept always.
        spread: Parameters lie spread over devices: they are gathered when the module's inputs are there, not before,
            and in the dtype the module computes in.
    """

    def __init__(self, module: nn.Module, keep: Collection[str] = (), *, spread: bool = False) -> None:
        self.module = module
        self.keep = frozenset(keep)
        self.spread = spread

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module.

        Args:
            args: Tensors in any nesting (pytrees), and other values.
            kwargs: The same.

        Raises:
            CandidateError: The module writes its buffers, which the second call would do again.
        """
        module = self.module
        inputs, spec = pytree.tree_flatten((args, kwargs))
        named = {f"module.{name}": p for name, p in module.named_parameters()}
        places = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)]
        tensors = [inputs[i] for i in places] + [_master(p) for p in named.values()]
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
            return plain_call(module)(*args, **kwargs)

        def run(given: list[torch.Tensor]) -> Any:
            fed, masters = given[: len(places)], given[len(places) :]
            weights = [m.to(p.dtype) for m, p in zip(masters, named.values(), strict=True)]
            if self.spread:
                held = _Held.apply(*fed, *weights)
                fed, weights = list(held[: len(fed)]), list(held[len(fed) :])
            leaves = list(inputs)
            for place, tensor in zip(places, fed, strict=True):
                leaves[place] = tensor
            own_args, own_kwargs = pytree.tree_unflatten(leaves, spec)
            return torch.func.functional_call(
                _Plain(module), dict(zip(named, weights, strict=True)), own_args, own_kwargs
            )

        call = _Call(run, self.keep, tuple(module.buffers()))
        flat = _Recompute.apply(call, *tensors)
        return pytree.tree_unflatten(list(flat), call.spec)


class _Held(torch.autograd.Function):
    """`hold_apart` with gradients, which pass as they are."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        del ctx
        return tuple(hold_apart(tensors))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        del ctx
        return grads


def _master(parameter: torch.Tensor) -> torch.Tensor:
    """Return the leaf that a parameter is a cast of, to be cast again; else the parameter.

    A step that computes in bfloat16 by casting its float32 weights would otherwise keep the copies until the backward.
    """
    node = parameter.grad_fn
    if node is None or node.name() != "ToCopyBackward0":
        return parameter
    leaf = getattr(node.next_functions[0][0], "variable", None)
    return parameter if leaf is None or leaf.shape != parameter.shape else leaf


class _Plain(nn.Module):
    """Calls a module by its own uncompiled call, so that a call routed through `recompute` does not come back to it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.train(module.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
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


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, _Packed)


def _is_random(name: str) -> bool:
    return name.startswith(f"{RANDOM}:")


def _versions(value: Any) -> list[int]:
    return [leaf._version for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]  # noqa: SLF001


class _Call:
    """One call: what runs, what it keeps, and the structure of its result."""

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

    def keeps(self, name: str) -> bool:
        return name in self.keep or _is_random(name)

    def first(self, tensors: list[torch.Tensor]) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
        """Run and return the leaves of the result, and the tensors kept."""
        kept: dict[str, Any] = {}
        versions: dict[str, list[int]] = {}

        def visit(name: str, op: Any, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
            del op, args, kwargs
            value = run()
            if self.keeps(name):
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


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: torch.Tensor) -> tuple[Any, ...]:
        leaves, kept = call.first(list(tensors))
        ctx.call, ctx.count = call, len(tensors)
        ctx.wanted = [t.requires_grad for t in tensors]
        ctx.save_for_backward(*tensors, *kept)
        return leaves

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        given = [g for g in grads if g is not None]
        held = hold_apart([*saved, *given])
        tensors = [t.detach().requires_grad_(wanted) for t, wanted in zip(held[: ctx.count], ctx.wanted, strict=True)]
        with torch.enable_grad():
            leaves = ctx.call.second(tensors, held[ctx.count : len(saved)])
        slopes = iter(held[len(saved) :])
        pairs = [(leaf, next(slopes)) for leaf, g in zip(leaves, grads, strict=True) if g is not None]
        pairs = [(leaf, slope) for leaf, slope in pairs if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        asked = [t for t in tensors if t.requires_grad]
        found = iter(torch.autograd.grad([p for p, _ in pairs], asked, [s for _, s in pairs], allow_unused=True))
        return (None, *(next(found) if wanted else None for wanted in ctx.wanted))
