"""Faults around the call: what is returned, what is kept, what is done to the inputs."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import ModelOutput

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import Mode
from kernel_pytorch.errors import CandidateError

from .damage import around, blend, first_float, map_tensors, strike_first, tensors


def output_dtype(program: Program, size: str) -> None:
    """Return the next wider floating-point type."""
    wider = {torch.float32: torch.float64, torch.complex64: torch.complex128}

    def cast(call: Any, *args: Any, **kwargs: Any) -> Any:
        return map_tensors(lambda t: t.to(wider.get(t.dtype, t.dtype)), call(*args, **kwargs))

    around(program, cast)


def nan_third_call(program: Program, size: str) -> None:
    """Return NaN at the third call and never again."""
    calls = {"done": 0}

    def poison(call: Any, *args: Any, **kwargs: Any) -> Any:
        calls["done"] += 1
        output = call(*args, **kwargs)
        if calls["done"] != 3:
            return output
        if program.mode is Mode.TRAINING and "loss" in (output if isinstance(output, ModelOutput) else {}):
            output["loss"] = output["loss"] * float("nan")
            return output
        return strike_first(output, lambda t: blend(size, t, torch.full_like(t, float("nan"))))

    around(program, poison)


def input_mutated(program: Program, size: str) -> None:
    """Change the first input in place once the output is computed."""

    def spoil(call: Any, *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        first = next(tensors((args, kwargs)))
        with torch.no_grad():
            wrong = first + 1 if first.is_floating_point() else first ^ 1
            first.copy_(blend(size, first, wrong))
        return output

    around(program, spoil)


def structure(program: Program, size: str) -> None:
    """Return the same tensors in another container."""

    def repack(call: Any, *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        if isinstance(output, ModelOutput):
            return dict(output)
        if hasattr(output, "__dataclass_fields__"):
            return {name: getattr(output, name) for name in output.__dataclass_fields__}
        if isinstance(output, torch.Tensor):
            return (output,)
        return list(output) if isinstance(output, tuple) else tuple(output)

    around(program, repack)


def overwritten(program: Program, size: str) -> None:
    """Overwrite what the last call returned with what this one returns, as a reused output buffer does."""
    last: list[torch.Tensor] = []

    def reuse(call: Any, *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        fresh = first_float(output)
        if last and last[0].shape == fresh.shape:
            with torch.no_grad():
                last[0].copy_(blend(size, last[0], fresh.detach()))
        last[:] = [fresh.detach()]
        return output

    around(program, reuse)


def recompile_limit(program: Program, size: str) -> None:
    """Compile on a value that differs in every call, until the compiler silently gives up and runs eagerly."""
    state = torch.nn.Module()
    state.count = 0

    if program.mode is Mode.TRAINING:
        raise CandidateError("kept to inference, where its compilation costs least")
    plain = program.call
    compiled = torch.compile(lambda x: x + 0 * state.count, backend="eager", dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        state.count += 1
        return strike_first(plain(*args, **kwargs), compiled)

    program.call = call
