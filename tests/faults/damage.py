"""Pieces that faults are made of: where to strike, how much of a tensor, and how to hook in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.errors import CandidateError

SIZES = ("tensor", "channel", "element")
NORMS = ("LayerNorm", "BatchNorm2d", "RMSNorm", "LlamaRMSNorm")


def blend(size: str, right: torch.Tensor, wrong: torch.Tensor, channel_dim: int = -1) -> torch.Tensor:
    """Return `right` with all of `wrong`, its middle channel, or its middle element."""
    if size == "tensor" or right.dim() == 0:
        return wrong
    return torch.where(part(size, right, channel_dim), wrong, right)


def part(size: str, like: torch.Tensor, channel_dim: int = -1) -> torch.Tensor:
    """Return a mask of the middle channel, or of the middle element, of a tensor.

    The middle, because the last position of a causal language model has no say in its loss.
    """
    struck = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    if size == "channel":
        struck.select(channel_dim, like.shape[channel_dim] // 2).fill_(True)
    else:
        struck[tuple(n // 2 for n in like.shape)] = True
    return struck


def channel_dim(module: nn.Module) -> int:
    """Return the axis that holds the channels of a module's output."""
    return 1 if isinstance(module, nn.Conv2d | nn.BatchNorm2d) else -1


def kind(module: nn.Module) -> str:
    """Return the class name of a module."""
    return type(module).__name__


def modules_of(model: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> list[nn.Module]:
    """Return the modules that are wanted.

    Raises:
        CandidateError: There is none.
    """
    found = [m for name, m in model.named_modules() if wanted(name, m)]
    if not found:
        raise CandidateError("nothing in this model that the fault could strike")
    return found


def _computes(name: str, module: nn.Module) -> bool:
    if name.endswith(("key", "k_proj", "pooler.dense", "spread")):  # cannot matter much, or is not always used
        return False
    return isinstance(module, nn.Linear | nn.Conv2d) or kind(module) in NORMS


def victim(model: nn.Module) -> nn.Module:
    """Return a layer in the middle of the model.

    Raises:
        CandidateError: There is none.
    """
    found = modules_of(model, _computes)
    return found[len(found) // 2]


def biased_victim(model: nn.Module) -> nn.Module:
    """Return a layer with a bias in the middle of the model; not one whose bias the mathematics cancels.

    Raises:
        CandidateError: There is none.
    """
    followed_by_norm = {"conv"}
    found = modules_of(
        model,
        lambda name, m: _computes(name, m) and name not in followed_by_norm and getattr(m, "bias", None) is not None,
    )
    return found[len(found) // 2]


def query_of(model: nn.Module) -> nn.Module:
    """Return the last query projection.

    Raises:
        CandidateError: The model has no attention.
    """
    return modules_of(model, lambda name, _: name.endswith(("query", "q_proj")))[-1]


def on_output(
    program: Program, module: nn.Module, change: Callable[[nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]
) -> None:
    """Replace what a module returns by `change(module, args, output)`."""
    handle = module.register_forward_hook(change)
    program.undo.append(handle.remove)


def around(program: Program, wrapper: Callable[..., Any]) -> None:
    """Replace the program's call by `wrapper(call, *args, **kwargs)`."""
    program.call = functools.partial(wrapper, program.call)


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of an output or of inputs, those of dataclasses included."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif hasattr(leaf, "__dataclass_fields__"):
            yield from tensors([getattr(leaf, name) for name in leaf.__dataclass_fields__])


def first_float(tree: Any) -> torch.Tensor:
    """Return the first floating-point tensor that is not a scalar."""
    return next(t for t in tensors(tree) if (t.is_floating_point() or t.is_complex()) and t.dim())


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """Return the tree with every tensor changed, dataclasses included."""

    def visit(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return change(leaf)
        if hasattr(leaf, "__dataclass_fields__"):
            fields = leaf.__dataclass_fields__
            return type(leaf)(**{name: map_tensors(change, getattr(leaf, name)) for name in fields})
        return leaf

    return pytree.tree_map(visit, tree)


def strike_first(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return the tree with its first floating-point tensor changed."""
    target = first_float(tree)
    return map_tensors(lambda t: change(t) if t is target else t, tree)
