"""Compile the whole call with `torch.compile` and Inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn

from kernel_pytorch.core.program import model_loss
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.bucketing import Bucketing
from kernel_pytorch.transforms.ceilings import COMPUTE, FUSIBLE, bounded, roofline
from kernel_pytorch.transforms.cuda_graph import Unrecordable
from kernel_pytorch.transforms.graph_report import Watched
from kernel_pytorch.transforms.plain_source import plain_source
from kernel_pytorch.transforms.scoped import inside_settings
from kernel_pytorch.transforms.traceable import refuse_untraceable
from kernel_pytorch.transforms.trees import map_tensors
from kernel_pytorch.transforms.weights_watch import WeightsWatch
from kernel_pytorch.transforms.xla_compile import (
    RECOMPILE_LIMIT,
    around,
    backend_of,
    buckets_of,
    check_backend,
    contiguous_inputs,
    settled,
    settled_by,
    settled_source,
)

__all__ = ["Compile", "compiled", "entry_point", "needs_compiler"]

_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


def needs_compiler(device: DeviceSpec) -> Skip | None:
    """Return why no code can be generated on this machine, if so: Inductor needs a C++ compiler, a TPU has its own."""
    if "cxx_compiler" in device.features or backend_of(device):
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


def frozen(inner: Callable[..., Any], **arguments: Any) -> Callable[..., Any]:
    """Return `inner` compiled with its weights as constants: folded, and packed as oneDNN wants them.

    Inductor reads `freezing` while it traces, from its process-wide configuration (as an option of `torch.compile` it
    comes too late and does nothing: measured), so it is set during the first call of each shape only.
    """
    from torch._inductor import config

    optimized = torch.compile(inner, **arguments)
    ready = set()

    def run(*args: Any, **kwargs: Any) -> Any:
        shapes = tuple([x.shape for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)])
        if shapes in ready:
            return optimized(*args, **kwargs)
        with config.patch(freezing=True):
            out = optimized(*args, **kwargs)
        ready.add(shapes)
        return out

    return run


def own_outputs(inner: Callable[..., Any]) -> Callable[..., Any]:
    """Return `inner` with outputs copied out of the memory that the next replay of a CUDA graph overwrites."""

    def run(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return map_tensors(inner(*args, **kwargs), lambda t: t.clone())

    return run


class _Refrozen:
    """A frozen call that compiles again when the weights it holds as constants have changed."""

    def __init__(self, inner: Callable[..., Any], program: Program, arguments: dict[str, Any]) -> None:
        self._make: Callable[[], Callable[..., Any]] = lambda: frozen(entry_point(inner), **arguments)
        self._call = self._make()
        self._notes = program.notes
        self._watch = WeightsWatch(program.model)
        self._first = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the call, with code for the weights as they are now."""
        if self._first:
            self._first = False
            self._watch.look()
            out = self._call(*args, **kwargs)
            self._watch.forget_moving()
            return out
        if self._watch.changed():
            self._notes.append("weights changed after freezing: compiled again")
            self._watch.look()
            self._call = self._make()
        return self._call(*args, **kwargs)


def compiled(program: Program, inner: Callable[..., Any], step: Step) -> Callable[..., Any]:
    """Return `inner` compiled as the step says, reporting into the program's notes."""
    arguments = _arguments(step)
    if step.params.get("freezing", False):
        optimized: Callable[..., Any] = _Refrozen(inner, program, arguments)
    else:
        optimized = torch.compile(entry_point(inner), **arguments)
    if _uses_cuda_graphs(step, program.model):
        optimized = own_outputs(optimized)
    if step.params.get("backend"):
        optimized = settled_by(step.params["backend"], contiguous_inputs(optimized))
    return Watched(optimized, program.notes, program.model)


class _Inside:
    """What a loss finds in the place of the model while both are traced as one function.

    Dynamo would look into the model itself for its class's own call, and miss what earlier steps put around it.
    """

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        self.model = model
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the call that the steps before this one made."""
        return self.call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def loss_compiled(program: Program, call: Callable[..., Any], step: Step) -> Callable[[Any, Any], torch.Tensor]:
    """Return the program's loss and the model's `call` compiled as one function, of the signature of the loss."""
    loss = program.loss or model_loss

    def wrap(inner: Callable[..., Any]) -> Callable[..., Any]:
        stand_in = _Inside(program.model, inner)
        one = torch.compile(entry_point(lambda batch: loss(stand_in, batch)), **_arguments(step))
        return Watched(settled_by(step.params.get("backend"), one), program.notes, program.model)

    whole = inside_settings(call, wrap)

    def run(model: Any, batch: Any) -> torch.Tensor:
        del model  # it is the program's own
        value: torch.Tensor = whole(batch)
        return value

    return run


class Compile:
    """`torch.compile`: `mode`, `dynamic=True`, `freezing=True` (inference: weights become constants, prepacked).

    On a TPU, `backend=tpu` (TorchTPU) or `backend=openxla` (PyTorch/XLA): they have no modes, and compile each shape by
    itself. `buckets=batch|batch_sequence` (inference) pads to powers of two around it, as `bucketing` does: then one
    compilation serves each bucket, and every size is accepted.

    In training, `scope=loss` also compiles the loss with the model inside it, for loops that call `kp.fused_loss`: what
    else a model returns (the logits of a language model) then is no output of the graph, and need not be kept.
    """

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
        if backend := backend_of(device):
            return [Step(self.name, {"backend": backend} | extra) for extra in around(workload)]
        settings: list[dict[str, Any]] = [{"mode": "default"}]
        if not frozen:
            settings.insert(0, {"mode": "default", "scope": "loss"})
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
        dynamic = bool(step.params.get("dynamic", False))
        if mode not in _MODES:
            raise CandidateError(f"unknown mode {mode!r} of compile; expected one of {', '.join(_MODES)}")
        check_backend(step, program.model)
        if step.params.get("freezing", False) and program.mode is Mode.TRAINING:
            raise CandidateError(f"{step} turns the weights into constants; it is for inference")
        buckets = str(step.params.get("buckets", ""))
        shapes = len(program.calls) if not buckets else buckets_of(program, sequence=buckets != "batch")
        if not dynamic and shapes > RECOMPILE_LIMIT:
            raise CandidateError(
                f"{shapes} input shapes are more than the {RECOMPILE_LIMIT} that torch.compile "
                f"specialises on before it runs uncompiled; {_fewer(step)}"
            )
        refuse_untraceable(program, step)
        if _with_loss(step, program):
            program.fused_loss = loss_compiled(program, program.call, step)
            program.notes.append("the loop must take its loss from kp.fused_loss(model, batch) to have the whole gain")
        program.call = inside_settings(program.call, lambda inner: compiled(program, inner, step))
        if buckets:
            program = Bucketing().apply(program, Step("bucketing", {"dims": buckets}))
        program.dynamic = program.dynamic and (dynamic or bool(buckets))
        if mode in _CUDA_GRAPHS:
            program.holds.append(Unrecordable(step, "it makes CUDA graphs of its own"))
        if step.params.get("freezing", False):
            program.holds.append(Unrecordable(step, "it looks at its weights at each call, which a replay skips"))
        return program

    def source(self, step: Step) -> str:
        """One call of `torch.compile`, with what freezing and CUDA graphs need around it."""
        inner = ", ".join(f"{k}={v!r}" for k, v in _arguments(step).items())
        functions: list[Callable[..., Any]] = []
        backend = step.params.get("backend")
        then = f"call = torch.compile(call, {inner})"
        if step.params.get("scope") == "loss":
            fused = f"torch.compile(lambda batch: loss(plain, batch), {inner})"
            then = (
                "# For a loop that needs the loss alone: fused = fused_loss(loss), then fused(batch), where `loss`\n"
                "# is loss(model, batch) and gets the model's call.\nplain = call\n\n"
                f"def fused_loss(loss):\n    return {settled_source(backend, fused)}\n\n" + then
            )
        if step.params.get("freezing", False):
            functions, then = [frozen], f"call = frozen(call, {inner})"
        if step.params.get("mode") in _CUDA_GRAPHS:
            functions += [map_tensors, own_outputs]
            then += "\nif next(model.parameters()).is_cuda:\n    call = own_outputs(call)"
        if backend:
            functions += [map_tensors, contiguous_inputs]
            then += f"\ncall = {settled_source(backend, 'contiguous_inputs(call)')}"
        if backend == "openxla":
            functions.append(settled)
        if step.params.get("buckets"):
            then += "\n" + Bucketing().source(Step("bucketing", {"dims": step.params["buckets"]}))
        return plain_source(*functions, then=then)


def _fewer(step: Step) -> str:
    return "use buckets=batch, or fewer shapes" if step.params.get("backend") else "use dynamic=True"


def _uses_cuda_graphs(step: Step, model: nn.Module) -> bool:
    return step.params.get("mode") in _CUDA_GRAPHS and any(p.is_cuda for p in model.parameters())


def _with_loss(step: Step, program: Program) -> bool:
    scope = step.params.get("scope", "call")
    if scope not in ("call", "loss"):
        raise CandidateError(f"unknown scope {scope!r} of compile; expected call or loss")
    if scope == "loss" and program.mode is not Mode.TRAINING:
        raise CandidateError(f"{step} compiles a loss; it is for training")
    if scope == "loss" and step.params.get("mode") in _CUDA_GRAPHS:
        raise CandidateError(f"{step}: kp.TrainStep records the whole step, with the loss in it")
    return scope == "loss"


def _arguments(step: Step) -> dict[str, Any]:
    if backend := step.params.get("backend"):
        return {"backend": str(backend), "dynamic": False}
    mode = str(step.params.get("mode", "default"))
    return {"dynamic": bool(step.params.get("dynamic", False)), "mode": mode}
