# mypy: disable-error-code="no-untyped-call"
"""Call a module and keep its inputs and a few chosen results; its backward computes the rest again.

The method is activation checkpointing (Chen et al. 2016, arXiv:1604.06174) with a choice of what to keep (selective
recomputation, Korthikanti et al. 2022, arXiv:2205.05198). Two things differ from `torch.utils.checkpoint`: the inputs
of the second computation and the gradient that asks for it pass one barrier together, so that a compiler of the whole
step neither merges it with the first nor starts it before it is needed; and random numbers are kept, never drawn
again, so that no generator state has to travel into a graph.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from kernel_pytorch.advanced_memory.barrier import hold_apart
from kernel_pytorch.advanced_memory.twice import Plainly, Twice, master
from kernel_pytorch.core.program import plain_call

__all__ = ["Recomputed", "recompute"]


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
        tensors = [inputs[i] for i in places] + [master(p) for p in named.values()]
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
                Plainly(module), dict(zip(named, weights, strict=True)), own_args, own_kwargs
            )

        call = Twice(run, self.keep, tuple(module.buffers()))
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


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Twice, *tensors: torch.Tensor) -> tuple[Any, ...]:
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
