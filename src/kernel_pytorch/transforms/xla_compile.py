"""What `torch.compile` is on a TPU: backends of their own, one program for each shape, and buckets that bound them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from kernel_pytorch.backends.tpu import torch_xla
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.bucketing import round_up
from kernel_pytorch.transforms.trees import map_tensors

__all__ = [
    "RECOMPILE_LIMIT",
    "around",
    "backend_of",
    "buckets_of",
    "check_backend",
    "contiguous_inputs",
    "settled",
    "settled_by",
    "settled_source",
]

RECOMPILE_LIMIT = 8
"""Shapes that Dynamo specialises one function on before it runs the next uncompiled."""
_LAZY = "openxla"
_BACKENDS = {"tpu": "tpu", "xla": _LAZY}
"""What compiles for a device that Inductor does not, by the type that torch calls it: TorchTPU and PyTorch/XLA."""


def backend_of(device: DeviceSpec) -> str:
    """Return what `torch.compile(backend=)` takes for a device; empty where it is Inductor."""
    if device.vendor != "tpu":
        return ""
    return _BACKENDS["tpu" if "torch_tpu" in device.features else "xla"]


def contiguous_inputs(inner: Callable[..., Any]) -> Callable[..., Any]:
    """Return `inner` on inputs without gaps: torch_tpu 0.2.0 compiles a backward that cannot read a saved view."""

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = map_tensors((args, kwargs), lambda t: t.contiguous())
        return inner(*args, **kwargs)

    return run


def settled(inner: Callable[..., Any], run_recorded: Callable[[], None]) -> Callable[..., Any]:
    """Return `inner`, called once all that is recorded has run.

    torch_xla 2.9 runs before a compiled call what is recorded for the inputs of that call, and gives their old buffers
    away as if nothing else read them: a clone of a parameter and an optimizer's momentum do.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        run_recorded()
        return inner(*args, **kwargs)

    return run


def settled_by(backend: object, inner: Callable[..., Any]) -> Callable[..., Any]:
    """Return `inner`, compiled with `backend`, with what that backend needs before each call: see `settled`."""
    return settled(inner, torch_xla.run_recorded) if backend == _LAZY else inner


def settled_source(backend: object, compiled: str) -> str:
    """Return an expression of plain source with what `settled_by` puts around it."""
    if backend != _LAZY:
        return compiled
    return f"settled({compiled}, lambda: torch_xla.sync(reset_scope=False))"


def around(workload: WorkloadSpec) -> list[dict[str, Any]]:
    """Return what else a step on a TPU says, best first: the loss in it; buckets, where there are several shapes."""
    if workload.mode is Mode.TRAINING:
        return [{"scope": "loss"}, {}]
    cases = list(workload.signatures.values())
    shapes = [tuple(s.shape for s in case) for case in cases]
    if len(set(shapes)) < 2:
        return [{}]
    lengths = [
        {s.shape[1] for case in cases for s in case[i : i + 1] if len(s.shape) > 1} for i in range(len(cases[0]))
    ]
    buckets = {"buckets": "batch_sequence" if any(len(found) > 1 for found in lengths) else "batch"}
    return [buckets, {}] if len(set(shapes)) > RECOMPILE_LIMIT else [{}, buckets]


def buckets_of(program: Program, *, sequence: bool) -> int:
    """Return how many buckets the example calls fall into, by the sizes of their first tensor."""
    leaves = [pytree.tree_leaves((call.args, dict(call.kwargs))) for call in program.calls.values()]
    firsts = [next((x for x in found if isinstance(x, torch.Tensor)), torch.empty(0)) for found in leaves]
    return len({tuple(round_up(size, ()) for size in t.shape[: 2 if sequence else 1]) for t in firsts})


def check_backend(step: Step, model: nn.Module) -> None:
    """Refuse a backend for another device than the model's, and what only Inductor has.

    Raises:
        CandidateError: With what was expected.
    """
    kind = next((p.device.type for p in model.parameters()), "cpu")
    wanted, given = _BACKENDS.get(kind, ""), str(step.params.get("backend", ""))
    if given != wanted:
        named = f"backend={wanted}" if wanted else "no backend but Inductor"
        raise CandidateError(f"{step}: a model on {kind} is compiled with {named}")
    if step.params.get("buckets") and not given:
        raise CandidateError(f"{step}: on {kind}, bucketing is a step of its own")
    others = {*step.params} & {"mode", "dynamic", "freezing"}
    if given and others:
        raise CandidateError(f"{step}: {', '.join(sorted(others))}: backend={given} has none of Inductor's settings")
