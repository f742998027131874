"""Put modules and trees of tensors on a device, and leave the originals alone."""

from __future__ import annotations

import collections
import copy
import dataclasses
import gc
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import ModelError

__all__ = ["place", "release_cached"]


def release_cached() -> None:
    """Give memory that is held but not used back to the device: another process, or a large step, may need it."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def place(tree: Any, device: torch.device) -> Any:
    """Return a module, a tensor, or a tree of them on a device.

    What is there already is returned as it is; a module that has to move is copied tensor by tensor (ties kept,
    no second copy on its own device), and the original stays what it was.

    Raises:
        ModelError: The module cannot be copied, with the reason.
    """
    return pytree.tree_map(lambda leaf: _place(leaf, device), tree)


def _place(leaf: Any, device: torch.device) -> Any:
    if isinstance(leaf, torch.Tensor):
        # Inputs that want a gradient stay leaves on the device.
        return leaf if leaf.device == device else leaf.detach().to(device).requires_grad_(leaf.requires_grad)
    if isinstance(leaf, nn.Module):
        return _place_module(leaf, device)
    if isinstance(leaf, Call):
        return Call(place(leaf.args, device), place(dict(leaf.kwargs), device))
    if isinstance(leaf, collections.UserDict):  # a Hugging Face BatchEncoding is one
        shallow = copy.copy(leaf)
        shallow.data = place(leaf.data, device)
        return shallow
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        moved = copy.copy(leaf)
        for field in dataclasses.fields(leaf):
            object.__setattr__(moved, field.name, place(getattr(leaf, field.name), device))
        return moved
    return leaf


def _place_module(module: nn.Module, device: torch.device) -> nn.Module:
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    tensors |= {id(v): v for m in module.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)}
    if all(t.device == device for t in tensors.values()):
        return module
    memo: dict[int, Any] = {}
    for key, tensor in tensors.items():
        moved = tensor.detach().to(device)
        if isinstance(tensor, nn.Parameter):
            moved = nn.Parameter(moved, requires_grad=tensor.requires_grad)
        memo[key] = moved
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # a module's own __deepcopy__ or __reduce__ may raise anything
        raise ModelError(
            f"the model cannot be copied to {device}: {type(error).__name__}: {error}",
            fix="pass a Workload whose `model` factory builds it on the device",
        ) from error
