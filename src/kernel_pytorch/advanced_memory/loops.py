# mypy: disable-error-code="no-untyped-call"
"""One loop of the compiled program over stacked tensors: `stablehlo.while` on both TPU runtimes.

The operator is a scan as of `jax.lax.scan`: a carry goes from step to step, each step reads its slice of stacked inputs
and adds its slice to stacked results. TorchTPU lowers PyTorch's higher-order operator `scan`; PyTorch/XLA has a loop of
its own. Gradients do not pass: for the inside of an `autograd.Function`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["Body", "loop"]

Tensors = Sequence[torch.Tensor]
Body = Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]

_REVERSE = "torch_tpu_scan_reverse"
"""Noted on the nodes of a body, it has TorchTPU 0.2.0 count down; a flip of inputs and results would copy them."""


def loop(
    body: Body, carry: Tensors, stacked: Tensors, shared: Tensors = (), *, reverse: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the last carry, and the results of all steps stacked.

    Args:
        body: `body(carry, slices, shared)` returns the next carry and the step's results. It is traced once, with
            gradients enabled, and may take gradients of what it computes itself.
        carry: Tensors whose shapes and dtypes no step changes.
        stacked: `[steps, ...]` each.
        shared: The same in every step.
        reverse: Begin with the last slice. Results lie where the slices they belong to do.
    """
    if carry[0].device.type == "xla":
        from kernel_pytorch.backends.tpu.torch_xla import loop as xla_loop

        return xla_loop(body, carry, stacked, shared, reverse=reverse)
    from torch._functorch._aot_autograd.functional_utils import from_fun, to_fun
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    counts = len(carry), len(stacked)

    def flat(*given: torch.Tensor) -> list[torch.Tensor]:
        first, second = counts[0], sum(counts)
        with FunctionalTensorMode():  # as the step around it is traced, and with the operators that leaves
            held = [to_fun(t) for t in given]
            after, results = body(held[:first], held[first:second], held[second:])
            # What a loop returns may not be what it was given, nor the same tensor twice.
            plain: list[Any] = [from_fun(t.detach().clone()) for t in (*after, *results)]
            return plain

    graph = _traced(flat, [*carry, *(t[0] for t in stacked), *shared])
    flipped = reverse and carry[0].device.type != "tpu"
    if reverse:
        for node in graph.graph.nodes:
            node.meta["custom"] = {**(node.meta.get("custom") or {}), _REVERSE: True}
    given = [t.flip(0) for t in stacked] if flipped else list(stacked)
    with torch._C._AutoDispatchBelowAutograd():  # noqa: SLF001
        found = torch.ops.higher_order.scan(graph, list(carry), given, tuple(shared))
    after, results = list(found[: counts[0]]), list(found[counts[0] :])
    return after, [t.flip(0) for t in results] if flipped else results


def _traced(body: Callable[..., list[torch.Tensor]], samples: list[torch.Tensor]) -> fx.GraphModule:
    """Return a body as a graph; where tensors have values, none of them is computed."""
    from torch._higher_order_ops.utils import materialize_as_graph

    with contextlib.ExitStack() as stack:
        if detect_fake_mode(samples) is None:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            samples = [mode.from_tensor(t.detach()) for t in samples]
            stack.enter_context(mode)
        graph = materialize_as_graph(body, tuple(samples), force_enable_grad=True)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph
