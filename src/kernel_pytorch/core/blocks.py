"""The repeated blocks of a model, by the name of their class."""

from __future__ import annotations

from itertools import groupby

from torch import nn

from kernel_pytorch.core.describe import fingerprint

__all__ = ["blocks_of", "runs_of"]


def blocks_of(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules whose class has this name and that lie in no other such module."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if type(module).__name__ == name and id(module) not in inside:
            found.append(module)
            inside.update(id(child) for child in module.modules())
    return found


def runs_of(model: nn.Module, name: str) -> list[list[nn.Module]]:
    """Return the modules of a class that follow each other in a ModuleList or Sequential and have one structure.

    Their trees of modules and the names, shapes, dtypes and ties of their parameters and buffers are the same
    (`core.describe.fingerprint`). Runs of two or more, in the order of the model; a module is in one run at most.
    """
    found: list[list[nn.Module]] = []
    seen: set[int] = set()
    for parent in model.modules():
        if not isinstance(parent, nn.ModuleList | nn.Sequential):
            continue
        for kind, members in groupby(parent, lambda m: (type(m).__name__, fingerprint(m))):
            run = list(members)
            new = {id(m) for m in run}
            if kind[0] == name and len(new) == len(run) > 1 and not new & seen:
                seen |= new
                found.append(run)
    return found
