"""What memory patterns a program can take, and what each costs in operations: by tracing alone, in a child.

Operations are PyTorch's own count over the traced step after dead code is removed. Which results of a block are worth
keeping is tried in the order of operations saved a byte; one whose recomputation was not needed anyway saves none, and
is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from kernel_pytorch.advanced_memory.logits import ChunkedLogits
from kernel_pytorch.advanced_memory.twice import RANDOM, Results
from kernel_pytorch.backends.tpu.flops import counted_as
from kernel_pytorch.backends.tpu.steps import TraceError, trace_step
from kernel_pytorch.core.blocks import blocks_of
from kernel_pytorch.core.describe import repeated_blocks
from kernel_pytorch.core.program import model_loss, plain_call
from kernel_pytorch.core.types import Candidate, Mode, Scalar, Skipped, Step
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.fit.build import Build

__all__ = ["Option", "Survey", "survey"]

_CHUNKS, _LEAST_ROWS = 16, 128
_MOST_KEPT = 4
_PADDED = Step("splash_attention", {"pad": 128})
"""For heads that the kernels do not take as they are; where they do, columns of zeros win nothing (tpu-log.md)."""
_SPREAD_LOOP = "a loop over blocks is not spread over devices: their marks are on each block's call"


@dataclass(frozen=True, slots=True)
class Option:
    """One set of patterns.

    Attributes:
        flops: Of the whole step.
        kept_bytes: What the blocks keep between forward and backward besides their inputs; `None` where they keep all.
        loop: The same with the recomputed blocks as one loop, where they can be.
    """

    candidate: Candidate
    flops: int
    kept_bytes: int | None = None
    loop: Candidate | None = None


@dataclass(frozen=True, slots=True)
class Survey:
    """What can be tried on one program.

    Attributes:
        flops: Of the unmodified step.
        options: Fewest operations first; the unmodified step is not among them.
        left_out: Patterns that do not apply, and why.
        block: Class of the repeated blocks; empty where none repeats.
    """

    flops: int
    options: tuple[Option, ...]
    left_out: tuple[Skipped, ...] = ()
    block: str = ""


def survey(build: Build, *, partitioned: bool = False, known: int = 0) -> Survey:
    """Return the patterns that a program can take; runs where a TPU device is known.

    Args:
        build: The unmodified program.
        partitioned: Whether it will be spread over several devices, which Mosaic kernels cannot be.
        known: Operations of the unmodified step, where they were counted before; else they are counted here.
    """
    left_out: list[Skipped] = []
    base = known or _flops(build, ())
    options: list[Option] = []
    common: list[Step] = []

    def add(*steps: Step) -> bool:
        try:
            flops = _flops(build, (*common, *steps))
        except (CandidateError, TraceError) as error:
            left_out.append(Skipped(steps[-1].transform, str(error)))
            return False
        common.extend(steps)
        options.append(Option(Candidate(tuple(common)), flops))
        return True

    if partitioned:
        left_out.append(Skipped("splash_attention", "Mosaic kernels cannot be split over devices by the partitioner"))
        if build.mode is Mode.TRAINING:
            _add_attention(Step("chunked_attention", {"rows": 1024}), add, build.mode, left_out)
    else:
        _add_splash(add, build.mode, left_out)
    if build.mode is Mode.TRAINING:
        logits = _logits(build)
        if logits:
            add(Step("chunked_loss", {"rows": max(_LEAST_ROWS, -(-logits // _CHUNKS // _LEAST_ROWS) * _LEAST_ROWS)}))
        else:
            left_out.append(Skipped("chunked_loss", "the loss computes no cross-entropy of a linear layer's result"))
    block = _most_repeated(build)
    if build.mode is not Mode.TRAINING:
        left_out.append(Skipped("recompute", "nothing is kept for a backward in inference"))
    elif not block:
        left_out.append(Skipped("recompute", "no class of blocks repeats in the model"))
    else:
        recomputing = list(_recomputing(build, common, block, left_out))
        no_loop = _SPREAD_LOOP if partitioned else _no_loop(build, common, block)
        if no_loop:
            left_out.append(Skipped("scan_layers", no_loop))
        options += recomputing if no_loop else [replace(o, loop=_looped(o.candidate)) for o in recomputing]
    return Survey(base, tuple(sorted(options, key=lambda o: o.flops)), tuple(left_out), block)


def _add_splash(add: Callable[..., bool], mode: Mode, left_out: list[Skipped]) -> None:
    """Add splash kernels for heads as they are, else padded, where that helps."""
    if _add_attention(Step("splash_attention"), add, mode, left_out):
        return
    refused = left_out.pop()
    if not _add_attention(_PADDED, add, mode, left_out):
        left_out[-1] = refused


def _add_attention(step: Step, add: Callable[..., bool], mode: Mode, left_out: list[Skipped]) -> bool:
    """Add a pattern of attention, and say whether it applies.

    If need be the masks that transformers makes while it is traced are taken away. Where neither applies, the reason
    that remains is what stands in the way once the masks are gone, if they go.
    """
    if add(step):
        return True
    if mode is not Mode.TRAINING:
        return False
    with_masks = left_out.pop()
    if add(Step("causal_mask"), step):
        return True
    if not left_out[-1].reason.startswith(f"{step.transform}:"):
        left_out[-1] = with_masks
    return False


def _recomputing(build: Build, common: list[Step], block: str, left_out: list[Skipped]) -> Iterator[Option]:
    """Yield sets that recompute blocks: nothing kept first, then one result more at a time."""
    results = _results(build, common, block)
    kept: list[str] = []
    before = 0
    worth = sorted(results, key=lambda n: (-results[n].flops / max(results[n].bytes, 1), results[n].bytes))
    for name in ("", *worth):
        tried = sorted({*kept, name} - {""})
        params: dict[str, Scalar] = {"block": block, "keep": ",".join(tried), "plain": 1}
        candidate = Candidate((*common, Step("recompute", params)))
        try:
            flops = _flops(build, candidate.steps)
        except (CandidateError, TraceError) as error:
            left_out.append(Skipped("recompute", str(error)))
            return
        if before and flops >= before:
            continue
        before, kept = flops, tried
        yield Option(candidate, flops, sum(results[n].bytes for n in tried))
        if len(kept) >= _MOST_KEPT:
            return


def _no_loop(build: Build, common: list[Step], block: str) -> str:
    """Return why recomputed blocks cannot be one loop; empty where they can."""
    try:
        _flops(build, (*common, Step("scan_layers", {"block": block, "keep": "", "plain": 1})))
    except (CandidateError, TraceError) as error:
        return str(error)
    return ""


def _looped(candidate: Candidate) -> Candidate:
    *others, recompute = candidate.steps
    return Candidate((*others, Step("scan_layers", recompute.params)))


@dataclass(frozen=True, slots=True)
class _Result:
    flops: int
    bytes: int


def _results(build: Build, common: list[Step], block: str) -> Mapping[str, _Result]:
    """Return operations and bytes of each named result of the first block."""
    program, batch = replace(build, candidate=Candidate(tuple(common)))()
    first = blocks_of(program.model, block)[0]
    found: dict[str, _Result] = {}

    def visit(name: str, op: Any, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        value = run()
        formula = flop_registry.get(counted_as(op.overloadpacket))
        if formula is not None and not name.startswith(RANDOM):
            tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
            size = sum(t.numel() * t.element_size() for t in tensors)
            found[name] = _Result(int(formula(*args, **kwargs, out_val=value)), size)
        return value

    def watched(*args: Any, **kwargs: Any) -> Any:
        with Results(visit):
            return plain_call(first)(*args, **kwargs)

    first._compiled_call_impl = watched  # noqa: SLF001
    trace_step(program, batch)
    return found


def _logits(build: Build) -> int:
    """Return the rows of the largest matrix of logits whose cross-entropy the loss takes; 0 where there is none."""
    program, batch = build()
    mode = ChunkedLogits(1 << 30)
    loss = program.loss or model_loss

    def watched(model: Any, given: Any) -> torch.Tensor:
        with mode:
            return loss(model, given)

    program.loss = watched
    trace_step(program, batch)
    return max(mode.seen, default=0)


def _most_repeated(build: Build) -> str:
    program, _ = build()
    counts = repeated_blocks(program.model)
    sizes = {
        name: sum(p.numel() for block in blocks_of(program.model, name) for p in block.parameters()) for name in counts
    }
    return max(sizes, key=lambda name: sizes[name], default="")


def _flops(build: Build, steps: tuple[Step, ...]) -> int:
    program, batch = replace(build, candidate=Candidate(tuple(steps)))()
    return trace_step(program, batch).flops
