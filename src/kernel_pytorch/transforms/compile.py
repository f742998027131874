"""Compile the whole call with `torch.compile` and Inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.ceilings import COMPUTE, FUSIBLE, bounded, roofline
from kernel_pytorch.transforms.graph_report import Watched
from kernel_pytorch.transforms.scoped import inside_settings

__all__ = ["Compile", "entry_point", "needs_compiler"]

_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def needs_compiler(device: DeviceSpec) -> Skip | None:
    """Return why Inductor cannot generate code on this machine, if so."""
    if "cxx_compiler" in device.features:
        return None
    return Skip("Inductor needs a C++ compiler and none was found", fix="apt-get install g++")


def entry_point(inner: Callable[..., Any]) -> Callable[..., Any]:
    """Return `inner` behind a code object of its own.

    Dynamo keeps its cache, and counts recompilations, by code object, and every `nn.Module` shares that of
    `Module._call_impl`: candidates tried in one process would use up each other's recompile limit.
    """

    def entry(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    return FunctionType(entry.__code__.replace(), entry.__globals__, "entry", None, entry.__closure__)


class Compile:
    """`torch.compile`: `mode`, `dynamic=True`, `freezing=True` (inference: weights become constants, prepacked)."""

    name = "compile"
    summary = "compile the model with torch.compile"
    group = "compile"
    numerics = Numerics.REORDERED
    modes = frozenset({Mode.INFERENCE, Mode.TRAINING})
    compiles = True

    def probe(self, device: DeviceSpec) -> Skip | None:
        """A C++ compiler is needed."""
        return needs_compiler(device)

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """The default mode first, what takes longest to compile last."""
        skip = self.probe(device)
        if skip is not None:
            return skip
        frozen = workload.mode is Mode.INFERENCE
        settings: list[dict[str, Any]] = [{"mode": "default"}]
        if frozen:
            settings.append({"mode": "default", "freezing": True})
        if device.vendor in ("nvidia", "amd"):
            settings.append({"mode": "reduce-overhead"})
        settings.append({"mode": "default", "dynamic": True})
        if device.vendor == "cpu" and frozen:
            settings.append({"mode": "max-autotune", "freezing": True})
        elif device.vendor != "cpu":
            settings += [{"mode": "max-autotune-no-cudagraphs"}, {"mode": "max-autotune"}]
        return [Step(self.name, s) for s in settings]

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """What can be fused may vanish; what computes may reach the peak rate."""
        del step
        remaining = dict.fromkeys(FUSIBLE, 0.0)
        for share in prediction.shares:
            if share.kind in COMPUTE:
                remaining[share.kind] = roofline(share, prediction, device, "float32")
        return bounded(prediction, remaining)

    def apply(self, program: Program, step: Step) -> Program:
        """Wrap the call; code is generated at the first call of each shape."""
        mode = str(step.params.get("mode", "default"))
        if mode not in _MODES:
            raise CandidateError(f"unknown mode {mode!r} of compile; expected one of {', '.join(_MODES)}")
        dynamic = bool(step.params.get("dynamic", False))
        arguments = _arguments(step)

        def wrap(inner: Callable[..., Any]) -> Callable[..., Any]:
            return Watched(torch.compile(entry_point(inner), **arguments), program.notes)

        program.call = inside_settings(program.call, wrap)
        program.dynamic = program.dynamic and dynamic
        return program

    def source(self, step: Step) -> str:
        """One call of `torch.compile`."""
        inner = ", ".join(f"{k}={v!r}" for k, v in _arguments(step).items())
        return f"import torch\n\ncall = torch.compile(call, {inner})\n"


def _arguments(step: Step) -> dict[str, Any]:
    mode = str(step.params.get("mode", "default"))
    arguments: dict[str, Any] = {"dynamic": bool(step.params.get("dynamic", False))}
    if step.params.get("freezing", False):
        # As an option of this one call: the same name in torch._inductor.config holds for the whole process.
        options: dict[str, Any] = {} if mode == "default" else dict(torch._inductor.list_mode_options(mode))  # noqa: SLF001
        arguments["options"] = {**options, "freezing": True}
    else:
        arguments["mode"] = mode
    return arguments
