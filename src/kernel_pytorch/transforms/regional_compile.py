"""Compile the repeated blocks of a model: the code of one serves all, so compiling takes a fraction of the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from kernel_pytorch.core.blocks import blocks_of
from kernel_pytorch.core.program import plain_call
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.compile import Compile, entry_point, needs_compiler
from kernel_pytorch.transforms.graph_report import Watched
from kernel_pytorch.transforms.plain_source import plain_source
from kernel_pytorch.transforms.traceable import refuse_untraceable
from kernel_pytorch.transforms.xla_compile import backend_of, contiguous_inputs, settled, settled_by, settled_source

__all__ = ["RegionalCompile"]

_FEWEST = 3


class RegionalCompile:
    """`torch.compile` of each block of a repeated class, after PyTorch's "regional compilation" recipe."""

    name = "regional_compile"
    summary = "compile the repeated blocks only, which takes a fraction of the compile time"
    group = "compile"
    numerics = Numerics.REORDERED
    modes = frozenset({Mode.INFERENCE, Mode.TRAINING})
    compiles = True

    def probe(self, device: DeviceSpec) -> Skip | None:
        """A C++ compiler is needed."""
        return needs_compiler(device)

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """The class that repeats with most in it; containers and single layers are left out."""
        skip = self.probe(device)
        if skip is not None:
            return skip
        builtin = {n for n in dir(nn) if isinstance(getattr(nn, n), type)} - _BLOCKS_OF_TORCH
        names = [n for n, count in workload.blocks.items() if count >= _FEWEST and n not in builtin]
        if not names:
            return Skip(f"no class of blocks repeats {_FEWEST} times or more")
        backend = backend_of(device)
        return [Step(self.name, {"block": names[0]} | ({"backend": backend} if backend else {}))]

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """As for the whole model."""
        return Compile().ceiling(step, prediction, device)

    def apply(self, program: Program, step: Step) -> Program:
        """Compile each block in the slot that `nn.Module.compile` uses."""
        name = str(step.params.get("block", ""))
        blocks = blocks_of(program.model, name)
        if not blocks:
            raise CandidateError(f"the model has no module of class {name!r}")
        if program.model in blocks:
            raise CandidateError(f"{name!r} is the model itself; use compile")
        refuse_untraceable(program, step)
        # One code object for all of them, and not the one that every other module shares: see `entry_point`.
        call = torch.compile(entry_point(_call_block), **_arguments(step))
        for block in blocks:
            before = block._compiled_call_impl  # noqa: SLF001
            program.undo.append(lambda block=block, before=before: _set_call(block, before))  # type: ignore[misc]
            bound = _bound(call, block)
            if backend := step.params.get("backend"):
                bound = settled_by(backend, contiguous_inputs(bound))
            _set_call(block, Watched(bound, program.notes, block))
        program.dynamic = False
        return program

    def source(self, step: Step) -> str:
        """A loop over the blocks."""
        inner = ", ".join(f"{k}={v!r}" for k, v in _arguments(step).items())
        then = f"for block in blocks_of(model, {step.params['block']!r}):\n    block.compile({inner})"
        compiled = "block._compiled_call_impl"
        around = settled_source(step.params.get("backend"), compiled)
        if around == compiled:
            return plain_source(blocks_of, then=then)
        return plain_source(blocks_of, settled, then=f"{then}\n    {compiled} = {around}")


_BLOCKS_OF_TORCH = {"TransformerEncoderLayer", "TransformerDecoderLayer"}


def _arguments(step: Step) -> dict[str, Any]:
    backend = step.params.get("backend")
    return {"dynamic": False} | ({"backend": str(backend)} if backend else {})


def _call_block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return plain_call(block)(*args, **kwargs)


def _bound(call: Callable[..., Any], block: nn.Module) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return call(block, *args, **kwargs)

    return run


def _set_call(block: nn.Module, call: Any) -> None:
    block._compiled_call_impl = call  # noqa: SLF001
