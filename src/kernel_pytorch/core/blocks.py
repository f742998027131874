"""The repeated blocks of a model, by the name of their class."""

from __future__ import annotations

from torch import nn

__all__ = ["blocks_of"]


def blocks_of(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules whose class has this name and that lie in no other such module."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if type(module).__name__ == name and id(module) not in inside:
            found.append(module)
            inside.update(id(child) for child in module.modules())
    return found
