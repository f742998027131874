"""Record the call into CUDA graphs: one launch replays all kernels of a call, and Python's part of it is skipped.

The method is PyTorch's own (`torch.cuda.graph`, "CUDA semantics: CUDA Graphs" in its documentation). A graph repeats
what ran on the device, at the addresses it ran at, so what would be repeated wrongly is looked for before and refused
in words: host synchronisation, random numbers of the host, inputs that the call changes, outputs that cannot be copied.
"""

from __future__ import annotations

import linecache
import random
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from kernel_pytorch.backends.capture import end_failed_capture
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.ceilings import bounded
from kernel_pytorch.transforms.plain_source import plain_source
from kernel_pytorch.transforms.trees import map_tensors

__all__ = [
    "CudaGraph",
    "Graphed",
    "Pointers",
    "Recorder",
    "Unrecordable",
    "graphed",
    "no_graphs_on",
    "opaque",
    "signature",
]

_OWN = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
_WARM_UPS = 2
_CONSTANTS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True, slots=True)
class Unrecordable:
    """A mark in `Program.holds`: an earlier step does in Python, at each call, what a replay would skip."""

    step: Step
    reason: str


class Pointers:
    """Where the weights of a model, and the state of an optimizer, lie: a graph reads them at these addresses.

    Holding the tensors keeps the memory of a recorded graph valid until the change is noticed. Values that change in
    place (an optimizer's update, `load_state_dict`) are no change here: a replay sees them.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        tables: list[dict[Any, Any]] = []
        for module in model.modules():
            tables += [module._parameters, module._buffers, module._modules]  # noqa: SLF001
        slots: list[tuple[dict[Any, Any], Any]] = [(table, name) for table in tables for name in table]
        if optimizer is not None:
            slots += [(vars(optimizer), "state"), (vars(optimizer), "param_groups")]
            slots += [(group, "lr") for group in optimizer.param_groups if isinstance(group["lr"], torch.Tensor)]
            for parameter, state in optimizer.state.items():
                slots.append((optimizer.state, parameter))
                slots += [(state, key) for key, value in state.items() if isinstance(value, torch.Tensor)]
        self._slots = [(table, key, table[key], _pointer(table[key])) for table, key in slots]

    def moved(self) -> bool:
        """Return whether anything lies elsewhere, or is another object, than when this was made."""
        for table, key, held, pointer in self._slots:
            now = table.get(key)
            if now is not held or (pointer and now.data_ptr() != pointer):
                return True
        return False


def _pointer(value: Any) -> int:
    plain = type(value) in (torch.Tensor, nn.Parameter, nn.Buffer) and value.layout is torch.strided
    return int(value.data_ptr()) if plain else 0


class Recorder:
    """Records work on one CUDA device into graphs, which share one pool of memory.

    What replays leave in the pool is overwritten by the next replay of any of its graphs, so results are copied out.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], Any]) -> Any:
        """Run on the stream that recording uses, so that what libraries set up per stream exists before."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            out = run()
        current.wait_stream(self._stream)
        return out

    def inspect(self, run: Callable[[], Any]) -> tuple[Any, str]:
        """Run as `warm_up` does and return the result with what forbids recording it; empty if nothing was seen.

        Seen before rather than when a capture fails: the line is known, and nothing has to be mended.
        """
        before = _host_random_state()
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with _as_if_capturing():
                    out = self.warm_up(run)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        syncs = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
        for other in caught:
            if "ynchroniz" not in str(other.message):
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        if syncs:
            return out, f"the host waits for the device at {_line(syncs[0].filename, syncs[0].lineno)}"
        if _host_random_state() != before:
            return out, "it draws random numbers on the host, which a graph would repeat"
        return out, ""

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Record `run` without running it; return what replays it and returns the tensors it then fills.

        Raises:
            CandidateError: The device refused, with the reason and the line.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # The stream is set here as well: torch.cuda.graph leaves it set where ending the capture raises.
            with (
                torch.cuda.device(self.device),
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                out = run()
        except RuntimeError as error:
            first = _first(error)
            end_failed_capture(self.device, self._pool, self._stream)
            self._pool = torch.cuda.graph_pool_handle()
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            raise CandidateError(f"it cannot be recorded as a CUDA graph: {_told(first)}") from error

        def replay() -> Any:
            graph.replay()
            return out

        return replay


@contextmanager
def _as_if_capturing() -> Iterator[None]:
    """Let code that asks whether it is captured do what it does then: transformers looks at masks only otherwise."""
    real = torch.cuda.is_current_stream_capturing
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing = real


def _host_random_state() -> tuple[Any, ...]:
    return (random.getstate(), repr(np.random.get_state(legacy=False)), torch.get_rng_state().numpy().tobytes())


def _first(error: RuntimeError) -> RuntimeError:
    """Return what ended a capture; that ending it then raised too is the later error."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error


def _told(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OWN)]
    where = f" at {_line(frames[-1].filename, frames[-1].lineno or 0)}" if frames else ""
    return f"{text[0] if text else type(error).__name__}{where}"


def _line(filename: str, number: int) -> str:
    source = linecache.getline(filename, number).strip()
    return f"{filename}:{number}" + (f" `{source}`" if source else "")


def signature(leaves: Sequence[Any], spec: Any) -> tuple[Any, ...]:
    """Return what a recording is for: structure, layout of the tensors, values of the rest, and autocast.

    Raises:
        CandidateError: An argument is an object that a recording could not follow.
    """
    parts: list[Any] = [spec, torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            parts.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device))
        elif isinstance(leaf, _CONSTANTS):
            parts.append((type(leaf), leaf))
        else:
            raise CandidateError(f"an argument of type {type(leaf).__name__} would be frozen into the CUDA graph")
    return tuple(parts)


def no_graphs_on(model: nn.Module) -> str:
    """Return why a model cannot be recorded where it is; empty if it can."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    devices = {t.device for t in tensors.values()}
    if not tensors:
        return "the model has no parameters that tell its device"
    if all(d.type != "cuda" for d in devices):
        return f"no CUDA graphs on {next(iter(devices)).type}"
    if len(devices) > 1:
        odd = next(n for n, t in tensors.items() if t.device != next(iter(tensors.values())).device)
        return f"the model is on several devices ({odd} on {tensors[odd].device})"
    return ""


def opaque(value: Any) -> str:
    """Return the type of the first object in an output that `map_tensors` would pass on uncopied; else empty."""
    if isinstance(value, (torch.Tensor, *_CONSTANTS)):
        return ""
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, tuple | list):
        inner = list(value)
    elif hasattr(type(value), "__dataclass_fields__"):
        inner = [getattr(value, name) for name in type(value).__dataclass_fields__]
    else:
        return type(value).__name__
    return next((kind for kind in map(opaque, inner) if kind), "")


class Graphed:
    """A call that replays a recording of itself, one for each signature of its inputs.

    Args:
        inner: The call that is recorded.
        model: Its model; recordings are made again when parameters or buffers are replaced.
        notes: Where recordings that had to be made again are told.
        recorder: Makes the recorder, at the first call and whenever all recordings are dropped.
    """

    def __init__(
        self,
        inner: Callable[..., Any],
        model: nn.Module,
        notes: list[str],
        recorder: Callable[[torch.device], Any] = Recorder,
    ) -> None:
        self.inner = inner
        self.model = model
        self.notes = notes
        self._make = recorder
        self._recorder: Any = None
        self._pointers: Pointers | None = None
        self._recorded: dict[tuple[Any, ...], tuple[list[torch.Tensor], Callable[[], Any]]] = {}
        self._lock = threading.Lock()
        self._last: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Copy the inputs in, replay, and return copies of the outputs.

        Raises:
            CandidateError: The call cannot be recorded, with the reason.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        key = signature(leaves, spec)
        with self._lock:
            if self._pointers is None or self._pointers.moved():
                self._begin()
            if key not in self._recorded:
                self._recorded[key] = self._record(leaves, spec)
            static, replay = self._recorded[key]
            self._follow_last_stream()
            for held, given in zip(static, tensors, strict=True):
                held.copy_(given)
            return map_tensors(replay(), torch.clone)

    def release(self) -> None:
        """Free the recordings and their memory; the next call records again."""
        with self._lock:
            self._recorded.clear()
            self._pointers = self._recorder = self._last = None

    def _begin(self) -> None:
        reason = no_graphs_on(self.model) if self._make is Recorder else ""
        if reason:
            raise CandidateError(reason, fix="move the model to the device first")
        if self._recorded:
            self.notes.append("parameters were replaced: the CUDA graphs were recorded again")
        self._recorded.clear()
        device = next((p.device for p in (*self.model.parameters(), *self.model.buffers())), torch.device("cpu"))
        self._recorder = self._make(device)
        self._pointers = Pointers(self.model)

    def _follow_last_stream(self) -> None:
        """Wait for the last replay where it ran on another stream: all share their memory."""
        device = self._recorder.device
        if device.type != "cuda":
            return
        current = torch.cuda.current_stream(device)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current

    def _record(self, leaves: list[Any], spec: Any) -> tuple[list[torch.Tensor], Callable[[], Any]]:
        device = self._recorder.device
        elsewhere = [x.device for x in leaves if isinstance(x, torch.Tensor) and x.device != device]
        if elsewhere:
            raise CandidateError(f"an input is on {elsewhere[0]} and the model on {device}")
        # Outside inference mode, or the copies made here could not be written by later calls.
        with torch.inference_mode(mode=False), torch.no_grad():
            copies = [_static(x) if isinstance(x, torch.Tensor) else x for x in leaves]
            static = [x for x in copies if isinstance(x, torch.Tensor)]

            def run() -> Any:
                args, kwargs = pytree.tree_unflatten(copies, spec)
                return self.inner(*args, **kwargs)

            versions = [x._version for x in static]  # noqa: SLF001
            buffers = [(b, b.clone()) for b in self.model.buffers()]
            drawn = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
            for _ in range(_WARM_UPS):
                self._recorder.warm_up(run)
            out, reason = self._recorder.inspect(run)
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
            if drawn is not None:
                torch.cuda.set_rng_state(drawn, device)
            if not reason and [x._version for x in static] != versions:  # noqa: SLF001
                reason = "the call changes an input in place"
            if not reason and opaque(out):
                reason = f"it returns a {opaque(out)}, whose tensors the next replay would overwrite"
            if reason:
                raise CandidateError(f"it cannot be recorded as a CUDA graph: {reason}")
            return static, self._recorder.capture(run)


def _static(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor).copy_(tensor)


def graphed(inner: Callable[..., Any]) -> Callable[..., Any]:
    """Return `inner` recorded as a CUDA graph for each shape of its inputs; parameters must stay where they are."""
    recorded = {}
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]

    def record(leaves: list[Any], spec: Any) -> Any:
        static = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]
        args, kwargs = pytree.tree_unflatten(static, spec)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                inner(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            out = inner(*args, **kwargs)
        return graph, static, out

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = (spec, *[(x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in leaves])
        if key not in recorded:
            recorded[key] = record(leaves, spec)
        graph, static, out = recorded[key]
        for held, given in zip(static, leaves, strict=True):
            if isinstance(held, torch.Tensor):
                held.copy_(given)
        graph.replay()
        return map_tensors(out, torch.clone)

    return run


class CudaGraph:
    """A CUDA graph for each signature of the inputs, recorded at its first call."""

    name = "cuda_graph"
    summary = "replay the call as one CUDA graph"
    group = "graph"
    numerics = Numerics.EXACT
    modes = frozenset({Mode.INFERENCE})
    compiles = False

    def probe(self, device: DeviceSpec) -> Skip | None:
        """NVIDIA or AMD, and a device that has graphs."""
        if device.vendor not in ("nvidia", "amd"):
            return Skip(f"no CUDA graphs on {device.vendor}")
        return None if "cuda_graphs" in device.features else Skip(f"{device.arch} has no CUDA graphs")

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """For inference; what cannot be recorded is told at the first call."""
        if workload.mode is Mode.TRAINING:
            return Skip("a training step is recorded whole, by kp.TrainStep")
        return self.probe(device) or [Step(self.name)]

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """Launching may cost nothing; the kernels keep their time."""
        del step, device
        return bounded(prediction, {"overhead": 0.0})

    def apply(self, program: Program, step: Step) -> Program:
        """Wrap the call; what is recorded, or why it cannot be, shows at the first call of each signature."""
        for mark in program.holds:
            if isinstance(mark, Unrecordable):
                raise CandidateError(f"{step} cannot follow {mark.step}: {mark.reason}")
        reason = no_graphs_on(program.model)
        if reason:
            raise CandidateError(f"{step}: {reason}", fix="move the model to the device first")
        recorded = Graphed(program.call, program.model, program.notes)
        program.call = recorded
        program.dynamic = False
        program.undo.append(recorded.release)
        return program

    def source(self, step: Step) -> str:
        """The same recording, without the checks."""
        del step
        return plain_source(map_tensors, graphed, then="call = graphed(call)")
