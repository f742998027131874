"""What is judged, and how it is run: one call, a sequence of calls with its side effects."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.program import clone_call, state_digest
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import Candidate, Mode, Step
from kernel_pytorch.core.workload import Call, Workload
from kernel_pytorch.validation.compare import Flat, flatten

__all__ = ["Memo", "Observed", "Subject", "attempt", "observe", "routed", "run", "seeded"]

_MEMO_LIMIT_BYTES = 1 << 29


@dataclass(slots=True)
class Subject:
    """A candidate, the model it must equal, and how to apply steps to other copies of that model.

    Attributes:
        workload: Where inputs, loss, optimizer and the user's own accuracy come from.
        candidate: The steps.
        config: Budgets, mode and seed.
        reference: The unmodified model on the device, in the mode of the workload; only copies of it are run.
        program: The candidate applied; calling `program.model` is what users run.
        build: Applies steps to a copy of a model (not shipped): `build(model, candidate, calls)`.
        place: Puts a tree of inputs on the device.
        structural: Whether a step is exact or reordered, so that it can be judged at high precision.
        memo_dir: Where verdicts and oracle outputs that several trials share are kept; `None` keeps them in memory.
    """

    workload: Workload
    candidate: Candidate
    config: KernelPyTorchConfig
    reference: nn.Module
    program: Program
    build: Callable[[nn.Module, Candidate, Mapping[str, Call]], Program]
    place: Callable[[Any], Any]
    structural: Callable[[Step], bool]
    memo_dir: Path | None = None


def attempt(fn: Callable[[], Any]) -> tuple[Any, str]:
    """Run foreign code; return its result and an empty string, or `None` and what it raised in one line."""
    try:
        return fn(), ""
    except (KeyboardInterrupt, SystemExit, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001  # the model, or a transform's version of it, may raise anything
        first = (str(error).strip().splitlines() or [""])[0]
        return None, f"{type(error).__name__}: {first}"[:500]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators and restore them afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def routed(program: Program) -> nn.Module:
    """Return a program's module whose call is the program's; unlike a shipped one it takes any inputs."""
    program.model._compiled_call_impl = program.call  # noqa: SLF001
    return program.model


def run(model: Callable[..., Any], call: Call, mode: Mode, seed: int) -> Any:
    """Call a model once under a seed, with gradients only in training; the call's tensors are passed as they are."""
    with seeded(seed), torch.set_grad_enabled(mode is Mode.TRAINING):
        return model(*call.args, **call.kwargs)


@dataclass(slots=True)
class Observed:
    """A sequence of calls and what it left behind.

    Attributes:
        outputs: Output of each call, copied at once.
        inputs: Arguments after each call.
        mutated: Calls whose arguments changed, by index: their paths.
        overwritten: Calls whose output changed while the next call ran, by index.
        changed: Names in the state that changed, and modules whose mode or hooks did.
        buffers: Values of the changed buffers afterwards.
        deltas: By how much they changed.
        drew: Whether a call drew random numbers.
        settled: Whether equal calls are known to give equal bits and leave nothing behind, so that one answers for all.
        error: What the first failing call raised.
    """

    outputs: list[Flat] = field(default_factory=list)
    inputs: list[Flat] = field(default_factory=list)
    mutated: dict[int, list[str]] = field(default_factory=dict)
    overwritten: list[int] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    deltas: dict[str, torch.Tensor] = field(default_factory=dict)
    drew: bool = False
    settled: bool = False
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values that `torch.load(weights_only=True)` reads back."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**plain, "outputs": [f.as_dict() for f in self.outputs], "inputs": [f.as_dict() for f in self.inputs]}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Observed:
        """Return what `as_dict` gave."""
        outputs, inputs = ([Flat(**f) for f in plain[k]] for k in ("outputs", "inputs"))
        return cls(**{**plain, "outputs": outputs, "inputs": inputs})


def _generator_states() -> tuple[bytes, ...]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return tuple(bytes(s.numpy().tobytes()) for s in states)


def _differs(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.shape != b.shape or not torch.equal(a.nan_to_num(), b.nan_to_num())
        if a.is_floating_point()
        else (not torch.equal(a, b))
    )


def observe(model: nn.Module, calls: Sequence[tuple[Call, int]], mode: Mode) -> Observed:
    """Make calls one after another, each with its seed, and return everything they did.

    Args:
        model: Called as users call it.
        calls: Arguments (copied first) and seed of each call.
        mode: Gradients are enabled in training.
    """
    seen = Observed()
    before = state_digest(model)
    old = {k: v.detach().clone() for k, v in model.named_buffers()}
    last: Flat | None = None
    for i, (given, seed) in enumerate(calls):
        call = clone_call(given)
        with seeded(seed):
            state = _generator_states()
            with torch.set_grad_enabled(mode is Mode.TRAINING):
                out, error = attempt(lambda call=call: model(*call.args, **call.kwargs))  # type: ignore[misc]
            seen.drew |= state != _generator_states()
        if error:
            seen.error = f"call {i + 1}: {error}"
            break
        live = flatten(out)
        if last is not None and _any_differs(last, seen.outputs[-1]):
            seen.overwritten.append(i - 1)
        last = live
        seen.outputs.append(live.frozen())
        after, given_flat = (flatten((c.args, dict(c.kwargs)), "input") for c in (call, given))
        seen.inputs.append(after.frozen())
        changed = [k for k, v in given_flat.tensors.items() if k not in after.tensors or _differs(after.tensors[k], v)]
        if changed:
            seen.mutated[i] = changed
    now = state_digest(model)
    seen.changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    for name, value in model.named_buffers():
        if name in seen.changed and name in old and value.shape == old[name].shape:
            seen.deltas[name] = value.detach().double() - old[name].double()
    return seen


def _any_differs(live: Flat, copy: Flat) -> bool:
    return any(_differs(live.tensors[k], v) for k, v in copy.tensors.items())


class Memo:
    """Results that the trials of one search share, as files (`torch.save`, read with `weights_only=True`)."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.kept: dict[str, Any] = {}

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return what is stored under a key, else compute and store it; plain values and tensors only."""
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        if name in self.kept:
            return self.kept[name]
        path = None if self.directory is None else self.directory / f"{name}.pt"
        if path is not None and path.exists():
            with contextlib.suppress(OSError, RuntimeError, EOFError, pickle.UnpicklingError):
                self.kept[name] = torch.load(path, weights_only=True)
                return self.kept[name]
        value = compute()
        self.kept[name] = value
        if path is not None and _bytes(value) <= _MEMO_LIMIT_BYTES:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
            torch.save(value, temporary)
            os.replace(temporary, path)  # noqa: PTH105
        return value


def _bytes(value: Any) -> int:
    return sum(x.nbytes for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, torch.Tensor))  # noqa: SLF001
