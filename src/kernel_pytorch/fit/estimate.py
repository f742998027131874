"""Memory of an eager step from its traced graph: every storage lives from its operator to the last one that reads it.

What autograd saves is read again backward, so it lives until then; views share their base's storage; what the step
replaces (parameters, optimizer state) is updated in place. Left out: memory that an operator takes for itself and frees
before it returns, fragmentation, and the device context.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from kernel_pytorch.backends.tpu.buffers import Buffer
from kernel_pytorch.backends.tpu.steps import Role, StepGraph

__all__ = ["Estimate", "estimate_memory"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Memory of an eager step.

    Attributes:
        held_bytes: What is there between steps: parameters, buffers, optimizer state, and the batch.
        peak_bytes: Most that is there at once, what is held included.
        moved_bytes: Inputs and outputs of every operator once: what eager reads and writes.
        buffers: The temporaries at the peak, largest first.
    """

    held_bytes: int
    peak_bytes: int
    moved_bytes: int
    buffers: tuple[Buffer, ...]


def estimate_memory(step: StepGraph, *, block_bytes: int = 512) -> Estimate:
    """Return the memory that an eager run of a step holds.

    Args:
        step: Traced for any device.
        block_bytes: What the allocator rounds up to.
    """
    nodes = list(step.graph.graph.nodes)
    last = {key: i for i, node in enumerate(nodes) for read in node.all_input_nodes for key in _storages(read)}
    held = sum(_rounded(a.bytes, block_bytes) for a in step.arguments)
    updates = {id(node) for node in _replacing(step)}
    own = {key for node in nodes if node.op in ("placeholder", "get_attr") for key in _storages(node)}
    live: dict[int, Buffer] = {}
    taken = peak = moved = 0
    most: tuple[Buffer, ...] = ()
    for i, node in enumerate(nodes):
        if node.op != "call_function":
            continue
        made = {key: value for key, value in _storages(node).items() if key not in live and key not in own}
        for key, tensor in made.items():
            size = 0 if id(node) in updates else _rounded(tensor.untyped_storage().nbytes(), block_bytes)
            source = f"{step.modules.get(node.name) or 'step'}/{node.name}"
            live[key] = Buffer(node.name, size, _shape(tensor), source)
            taken += size
        if made:
            moved += sum(_bytes(t) for read in node.all_input_nodes for t in _tensors(read))
            moved += sum(_bytes(t) for t in _tensors(node))
        if taken > peak:
            peak, most = taken, tuple(live.values())
        for key in [*made, *(k for read in node.all_input_nodes for k in _storages(read))]:
            if last.get(key, i) <= i and key in live:
                taken -= live.pop(key).bytes
    return Estimate(held, held + peak, moved, tuple(sorted(most, key=lambda b: b.bytes, reverse=True)))


def _replacing(step: StepGraph) -> Iterator[fx.Node]:
    """Yield the nodes whose results take the place of an argument."""
    (out,) = step.graph.graph.find_nodes(op="output")
    for argument in step.arguments:
        if argument.output is not None and argument.role is not Role.BATCH:
            yield out.args[0][argument.output]


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)]


def _storages(node: fx.Node) -> dict[int, torch.Tensor]:
    return {tensor.untyped_storage()._cdata: tensor for tensor in _tensors(node)}  # noqa: SLF001


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _rounded(size: int, block: int) -> int:
    return math.ceil(size / block) * block


def _shape(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}[{','.join(map(str, tensor.shape))}]"
