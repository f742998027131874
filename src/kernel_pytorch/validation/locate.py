"""Find the first layer at which two models part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from kernel_pytorch.core.types import Mode
from kernel_pytorch.core.workload import Call
from kernel_pytorch.validation.compare import Flat, compare_values, flatten
from kernel_pytorch.validation.subject import attempt, run

__all__ = ["TOP", "first_difference"]

TOP = "(the model's own forward)"
"""Named where every submodule agrees and the model's output does not."""


@contextmanager
def _recorded(model: nn.Module, outputs: dict[str, Flat]) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():

        def keep(_module: nn.Module, _args: Any, out: Any, name: str = name) -> None:
            if name not in outputs:
                outputs[name] = flatten(out).frozen()

        handles.append(module.register_forward_hook(keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_difference(
    candidate: nn.Module,
    call_candidate: Callable[..., Any],
    reference: nn.Module,
    call: Call,
    mode: Mode,
    *,
    seed: int = 0,
    tolerance: float,
) -> str:
    """Return the path of the first module, in order of completion, whose output parts from the reference's.

    Args:
        candidate: Module tree of the candidate; paths it shares with the reference are compared.
        call_candidate: What runs it, submodule hooks included (so not a compiled call).
        reference: The unmodified model.
        call: Arguments, at the precision of both.
        mode: Gradients are enabled in training.
        seed: Random seed of both runs.
        tolerance: Relative error of the worst row that counts as parting.
    """
    mine: dict[str, Flat] = {}
    theirs: dict[str, Flat] = {}
    with _recorded(reference, theirs):
        attempt(lambda: run(reference, call, mode, seed))
    with _recorded(candidate, mine):
        attempt(lambda: run(call_candidate, call, mode, seed))
    for name, want in theirs.items():
        got = mine.get(name)
        if got is None:
            continue
        if got.kinds != want.kinds or any(got.tensors[k].shape != v.shape for k, v in want.tensors.items()):
            return name or TOP
        if any(not e.row <= tolerance for e in compare_values(got, want).values()):
            return name or TOP
    return ""
