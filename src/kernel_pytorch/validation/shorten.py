"""A large model's short stand-in: fewer of its repeated blocks, fewer samples, shorter sequences.

fp64 arithmetic, perturbed copies and stored gradients of billions of parameters take minutes and do not fit beside
the model. Blocks that repeat with one structure run the same code, so two of each, on small inputs, are judged by every
gate; what ships is then compared with the unmodified model at full size by `full_size`.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from kernel_pytorch.core.describe import fingerprint
from kernel_pytorch.core.program import clone_model, ship
from kernel_pytorch.core.types import Mode
from kernel_pytorch.core.workload import Call, Case, Workload
from kernel_pytorch.validation.oracle import batch_calls, loss_of
from kernel_pytorch.validation.subject import Subject, attempt, run
from kernel_pytorch.validation.vary import batch_size, resized, sequence_length

__all__ = ["LARGE_ELEMENTS", "is_large", "short_blocks", "short_subject"]

LARGE_ELEMENTS = 1 << 28
"""Elements of the state from which on a model is judged by a stand-in: 2 GiB in fp64."""

_KEPT = 2
"""Blocks kept of a run: one whose input is the embedding, one whose input is a block's output."""
_BATCH = 2
_LENGTH = 128


def is_large(model: nn.Module) -> bool:
    """Return whether a model's state is too large to be judged whole in fp64."""
    return sum(t.numel() for t in (*model.parameters(), *model.buffers())) > LARGE_ELEMENTS


@contextmanager
def short_blocks(model: nn.Module, kept: int = _KEPT) -> Iterator[int]:
    """Leave only the first `kept` of each run of equal blocks in a model's lists, in place; yield how many are out."""
    before: list[tuple[nn.Module, dict[str, Any]]] = []
    out = 0
    for parent in list(model.modules()):
        if not isinstance(parent, nn.ModuleList | nn.Sequential):
            continue
        seen: collections.Counter[str] = collections.Counter()
        left: dict[str, Any] = {}
        for child in parent:
            structure = f"{type(child).__qualname__} {fingerprint(child)}"
            seen[structure] += 1
            if seen[structure] <= kept or next(child.children(), None) is None:
                left[str(len(left))] = child
        if len(left) < len(parent):
            out += len(parent) - len(left)
            before.append((parent, dict(parent._modules)))  # noqa: SLF001
            parent._modules = left  # noqa: SLF001
    try:
        yield out
    finally:
        for parent, modules in reversed(before):
            parent._modules = modules  # noqa: SLF001


def _small(tree: Any) -> Any:
    call = tree if isinstance(tree, Call) else Call((tree,))
    batch = min(batch_size(call), _BATCH) or None
    length, image = sequence_length(call)
    small = resized(call, batch=batch, length=None if image else min(length, _LENGTH) or None)
    return small if isinstance(tree, Call) else small.args[0]


def _small_inputs(workload: Workload) -> Workload:
    """Return the workload with inputs of few samples and tokens; its loss, optimizer and accuracy stay."""

    def smaller(name: str) -> Callable[[int], Any]:
        return lambda seed: _small(workload.batch(name, seed))

    cases = {name: Case(smaller(name), case.weight) for name, case in workload.cases.items()}
    return replace(workload, inputs=cases, target="")


def short_subject(subject: Subject) -> tuple[Subject | None, str]:
    """Return the candidate applied to the short stand-in of its model, and what was left out in words.

    Where the model does not run with fewer blocks it keeps them, and where it does not take smaller inputs it gets its
    own; `None` where neither makes it smaller.

    Raises:
        CandidateError: A step does not fit the stand-in.
    """
    small = _small_inputs(subject.workload)
    with short_blocks(subject.reference) as out:
        short = clone_model(subject.reference) if out else subject.reference
    choices = [(short, small), (subject.reference, small), (short, subject.workload)]
    for reference, workload in choices if out else choices[1:2]:
        if _runs(subject, workload, reference):
            told = []
            if reference is short and out:
                told.append(f"{out} of the blocks that repeat are left out")
            if workload is small:
                told.append(f"inputs of at most {_BATCH} samples and {_LENGTH} tokens")
            return _with(subject, workload, reference), "judged in fp64 on a stand-in: " + "; ".join(told)
    return None, ""


def _runs(subject: Subject, workload: Workload, reference: nn.Module) -> bool:
    mode, seed = subject.config.mode, subject.config.seed

    def once() -> None:
        batch = subject.place(workload.batch(next(iter(workload.cases)), seed))
        if mode is Mode.TRAINING:
            loss_of(workload)(reference, batch).detach()
        else:
            run(reference, batch_calls(workload, reference, mode, batch), mode, seed)

    return not attempt(once)[1]


def _with(subject: Subject, workload: Workload, reference: nn.Module) -> Subject:
    calls: Mapping[str, Call] = {
        name: subject.place(workload.call(name, subject.config.seed)) for name in workload.cases
    }
    program = subject.build(clone_model(reference), subject.candidate, calls)
    ship(program, reference)
    directory = None if subject.memo_dir is None else subject.memo_dir / "short"
    return replace(subject, workload=workload, reference=reference, program=program, memo_dir=directory)
