# mypy: disable-error-code="no-untyped-call"
"""Consecutive blocks of one kind as one loop over their stacked weights, which computes each again in the backward.

A compiler then sees one block instead of all (`jax.lax.scan` over layers with `jax.checkpoint`, as in MaxText and
`torch_xla.experimental.scan_layers`). Between forward and backward there are the blocks' inputs and the results that
are kept, stacked. A loop that kept everything would hold more than the blocks written out: every intermediate of all
blocks in buffers of the loop, none fused away. So it always recomputes.

The loop runs where the first block is called. What the others are called with must be what came out of the one before
(the model is handed stand-ins that refuse any other use) and otherwise what the first was called with; that they
compute the same function is checked by tracing them (`alike`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from kernel_pytorch.advanced_memory.alike import difference
from kernel_pytorch.advanced_memory.barrier import hold_apart
from kernel_pytorch.advanced_memory.loops import loop
from kernel_pytorch.advanced_memory.twice import Plainly, Twice, master
from kernel_pytorch.core.program import plain_call
from kernel_pytorch.errors import CandidateError

__all__ = ["InLoop", "ScannedRun"]


class ScannedRun:
    """Consecutive blocks as one loop.

    Args:
        blocks: Two or more of one structure (`core.blocks.runs_of`), each called once a forward, in order.
        keep: Names of results of a block to keep from forward to backward (`twice.Results`).

    Attributes:
        calls: What runs in the place of each block's own call.
    """

    def __init__(self, blocks: Sequence[nn.Module], keep: Collection[str] = ()) -> None:
        self.blocks = list(blocks)
        self.keep = frozenset(keep)
        self.calls = [InLoop(self, i) for i in range(len(self.blocks))]
        self._checked: set[Any] = set()
        self._given: list[Any] = []
        self._place = 0
        self._next: torch.Tensor | None = None
        self._result: Any = None

    def first(self, args: Any, kwargs: Any) -> Any:
        """Run all blocks; return what stands for the first one's result.

        Raises:
            CandidateError: The blocks are no loop, with the reason.
        """
        self._let_go()
        given, spec = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(given) if isinstance(leaf, torch.Tensor)]
        trained = any(p.requires_grad for block in self.blocks for p in block.parameters())
        if not torch.is_grad_enabled() or not (trained or any(given[i].requires_grad for i in places)):
            return plain_call(self.blocks[0])(*args, **kwargs)
        if not places or not given[places[0]].is_floating_point():
            raise CandidateError("the blocks take no floating-point tensor that could be carried from one to the next")
        self._check(given, spec)
        call = _Loop(self.blocks, self.keep, given, spec, places)
        value = _Scan.apply(call, *call.tensors)
        self._given, self._place = given, places[0]
        self._result = pytree.tree_unflatten([value], call.spec)
        return self._stand_in(call.spec)

    def later(self, index: int, args: Any, kwargs: Any) -> Any:
        """Return what stands for the result of a block, or of the last one the result.

        Raises:
            CandidateError: It is called with anything else than the one before returned.
        """
        if self._next is None:
            return plain_call(self.blocks[index])(*args, **kwargs)
        given = pytree.tree_leaves((args, kwargs))
        same = len(given) == len(self._given) and given[self._place] is self._next
        others = [i for i in range(len(self._given)) if i != self._place]
        if not same or not all(_equal(given[i], self._given[i]) for i in others):
            raise CandidateError(
                f"block {index} is called with something else than the result of the one before and what the first had"
            )
        if index < len(self.blocks) - 1:
            return self._stand_in(pytree.tree_structure(self._result))
        result = self._result
        self._let_go()
        return result

    def _stand_in(self, spec: Any) -> Any:
        self._next = _between(self._given[self._place])
        return pytree.tree_unflatten([self._next], spec)

    def _let_go(self) -> None:
        self._given, self._next, self._result = [], None, None

    def _check(self, given: list[Any], spec: Any) -> None:
        key = tuple((tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else repr(x) for x in given)
        if key in self._checked:
            return
        reason = difference(self.blocks, given, spec)
        if reason:
            raise CandidateError(reason)
        self._checked.add(key)


class InLoop:
    """What runs in the place of the call of one block of a run."""

    def __init__(self, run: ScannedRun, index: int) -> None:
        self.run = run
        self.index = index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run all blocks, for the first; else hand on what came out."""
        return self.run.later(self.index, args, kwargs) if self.index else self.run.first(args, kwargs)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return one is other
    return one is other or bool(one == other)


_METADATA = {
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point,
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout")),
}  # fmt: skip


class _Between(torch.Tensor):
    """Stands for what a block in the middle of a loop returned: it can be handed on, and told the shape of."""

    like: torch.Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func in _METADATA and args and isinstance(args[0], _Between):
            return func(args[0].like, *args[1:], **(kwargs or {}))
        raise CandidateError(
            f"the model uses what lies between two blocks ({getattr(func, '__name__', func)}), and a loop gives it none"
        )


def _between(like: torch.Tensor) -> torch.Tensor:
    with _disable_current_modes(), torch._C.DisableTorchFunction():  # noqa: SLF001
        made = torch.empty(0, device="meta").as_subclass(_Between)
        made.like = like
    return made


class _Loop:
    """One forward of a run and its backward, as two loops.

    Attributes:
        tensors: The carry, what all blocks share, and the weights of block after block, each as its master.
        spec: Structure of a block's result, once one has been traced.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], keep: frozenset[str], given: list[Any], spec: Any, places: list[int]
    ) -> None:
        self.template = Plainly(blocks[0])
        self.keep = keep
        self.given, self.given_spec, self.places = given, spec, places
        named = [dict(block.named_parameters()) for block in blocks]
        self.names = list(named[0])
        self.dtypes = [named[0][name].dtype for name in self.names]
        self.shared = len(places) - 1
        weights = [master(block[name]) for block in named for name in self.names]
        self.tensors = [given[i] for i in places] + weights
        self.buffers = [list(stack) for stack in zip(*(block.buffers() for block in blocks), strict=True)]
        self.buffer_names = [name for name, _ in blocks[0].named_buffers()]
        self.wanted = [any(block[name].requires_grad for block in named) for name in self.names]
        self.spec: Any = None
        self.twice: Twice | None = None
        self.kept = 0

    def stacks(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the weights of all blocks stacked, in the dtypes the blocks compute in, then their buffers."""
        count = len(self.names)
        each = [[w.to(dtype) for w in weights[i::count]] for i, dtype in enumerate(self.dtypes)]
        return [torch.stack(same) for same in (*each, *self.buffers)]

    def run(self, tensors: list[torch.Tensor]) -> Any:
        """Call a block with a carry, shared tensors, weights and buffers."""
        leaves = list(self.given)
        for place, tensor in zip(self.places, tensors, strict=False):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.given_spec)
        names = [f"module.{name}" for name in (*self.names, *self.buffer_names)]
        state = dict(zip(names, tensors[len(self.places) :], strict=True))
        return torch.func.functional_call(self.template, state, args, kwargs)

    def forward(self, carry: Any, slices: Any, shared: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """One step: the carry after it; its input and what is kept."""
        (x,) = carry
        twice = Twice(self.run, self.keep, slices[len(self.names) :])
        with torch.no_grad():
            leaves, kept = twice.first([x, *shared, *slices])
        (result,) = leaves if len(leaves) == 1 else (None,)
        if not isinstance(result, torch.Tensor) or result.shape != x.shape or result.dtype != x.dtype:
            raise CandidateError("a block does not return one tensor like the one it takes")
        self.twice, self.spec, self.kept = twice, twice.spec, len(kept)
        return [result], [x, *kept]

    def backward(self, carry: Any, slices: Any, shared: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """One step: the gradient of its input and the sums of those of what is shared; those of its weights."""
        grad, *sums = carry
        x, kept, state = slices[0], list(slices[1 : 1 + self.kept]), slices[1 + self.kept :]
        assert self.twice is not None
        differentiable = [t.is_floating_point() for t in shared]
        wanted = [True, *differentiable, *self.wanted, *(False for _ in self.buffers)]
        tensors = [t.detach().requires_grad_(wants) for t, wants in zip((x, *shared, *state), wanted, strict=True)]
        with torch.enable_grad():
            (result,) = self.twice.second(tensors, kept)
        asked = [t for t in tensors if t.requires_grad]
        grads = list(torch.autograd.grad(result, asked, grad, allow_unused=True, materialize_grads=False))
        slope, of_shared, of_weights = grads[0], grads[1 : 1 + sum(differentiable)], grads[1 + sum(differentiable) :]
        self.used = [g is not None for g in of_weights]
        added = [s if g is None else s + g for s, g in zip(sums, of_shared, strict=True)]
        return [torch.zeros_like(x) if slope is None else slope, *added], [g for g in of_weights if g is not None]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Loop, *tensors: torch.Tensor) -> torch.Tensor:
        count = 1 + call.shared
        x, shared, weights = tensors[0], tensors[1:count], tensors[count:]
        (result,), kept = loop(call.forward, [x], call.stacks(weights), shared)
        ctx.call = call
        ctx.save_for_backward(*shared, *weights, *kept)
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call: _Loop = ctx.call
        # Behind a barrier, or the stacked weights of the forward would be held until now instead of stacked again.
        grad, *saved = hold_apart([grad, *ctx.saved_tensors])
        layers = len(call.tensors) - 1 - call.shared
        shared, weights, kept = saved[: call.shared], saved[call.shared :][:layers], saved[call.shared + layers :]
        sums = [torch.zeros_like(t) for t in shared if t.is_floating_point()]
        (slope, *added), found = loop(
            call.backward, [grad, *sums], [*kept, *call.stacks(weights)], shared, reverse=True
        )
        rest = iter(added)
        of_shared = [next(rest) if t.is_floating_point() else None for t in shared]
        return (None, slope, *of_shared, *_by_block(call, weights, found))


def _by_block(call: _Loop, weights: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Return the gradients of stacked weights block after block, as their masters have them."""
    stacked, used = iter(found), iter(call.used)
    blocks = len(weights) // len(call.names)
    none: Sequence[torch.Tensor | None] = [None] * blocks
    by_name = [next(stacked).unbind(0) if wants and next(used) else none for wants in call.wanted]
    grads = [of_name[i] for i in range(blocks) for of_name in by_name]
    return [None if g is None else g.to(w.dtype) for g, w in zip(grads, weights, strict=True)]
