"""From a program to what the TPU compiler says of it, in child processes: the parent's side.

torch_tpu ends its process on fatal errors, and a process that holds it cannot hold jax's TPU client as well. So one
child traces and lowers, another compiles, each with a deadline; whatever ends them is an error here.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_pytorch.backends.tpu import compiled_store, packages
from kernel_pytorch.backends.tpu.compiler import Compiled
from kernel_pytorch.backends.tpu.topology import Topology
from kernel_pytorch.errors import KptError

if TYPE_CHECKING:
    from kernel_pytorch.backends.tpu.steps import Argument
    from kernel_pytorch.core.protocols import Program

__all__ = ["COMPILE_LIMIT_S", "AheadError", "Lowered", "call_on_device", "compile_lowered", "lower_program"]

LOWER_LIMIT_S, COMPILE_LIMIT_S = 900.0, 5400.0

_LOWER, _COMPILE = "kernel_pytorch.backends.tpu.lower_worker", "kernel_pytorch.backends.tpu.compile_worker"
_CALL = "kernel_pytorch.backends.tpu.call_worker"


class AheadError(KptError):
    """A child died or took too long; the message holds its last words."""


@dataclass(frozen=True, slots=True)
class Lowered:
    """A program as StableHLO, and what is known of it before it is compiled.

    Attributes:
        stablehlo: Text with locations.
        arguments: In the order of the program's.
        flops: By PyTorch's formulas, after dead code is removed; see `StepGraph.flops`.
        seconds: Tracing and lowering, without the start of the child.
    """

    stablehlo: bytes
    arguments: tuple[Argument, ...]
    flops: int
    flops_by_operator: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def batch(self) -> int:
        """First dimension of the first input that has one; 0 where none has."""
        return next((a.shape[0] for a in self.arguments if a.role == "batch" and a.shape), 0)


def lower_program(build: Callable[[], tuple[Program, Any]], *, timeout_s: float = LOWER_LIMIT_S) -> Lowered:
    """Trace and lower a program in a child.

    Args:
        build: Returns the program and its batch; travels by cloudpickle and runs in the child, where a TPU device is
            known. Parameters may lie on `meta`.
        timeout_s: Limit of the child's life.

    Raises:
        AheadError: The child died or took too long.
        KptError: What the child found wrong: with the model, the target, or an operator that cannot be lowered.
    """
    import cloudpickle

    lowered: Lowered = _in_child(_LOWER, cloudpickle.dumps(build), timeout_s)
    return lowered


def call_on_device(function: Callable[..., Any], *args: Any, timeout_s: float = LOWER_LIMIT_S) -> Any:
    """Return what a function returns in a child where a TPU device is known, for tracing.

    Args:
        function: It and its arguments travel by cloudpickle, its result by pickle.
        args: Its arguments.
        timeout_s: Limit of the child's life.

    Raises:
        AheadError: The child died or took too long.
        KptError: What the function raised.
    """
    import cloudpickle

    return _in_child(_CALL, cloudpickle.dumps((function, args)), timeout_s)


def compile_lowered(
    lowered: Lowered,
    topology: Topology,
    *,
    partitions: int = 1,
    argument_shardings: Sequence[str] | None = None,
    windows: bool = True,
    dump: bool = True,
    timeout_s: float = COMPILE_LIMIT_S,
) -> Compiled:
    """Compile a lowered program in a child; see `compiler.compile_ahead` for the arguments, `compiled_store` for reuse.

    Raises:
        AheadError: The child died or took too long.
        KptError: The compiler is not installed, or refuses the program.
    """
    options = {
        "partitions": partitions,
        "argument_shardings": argument_shardings,
        "windows": windows,
        "dump": dump,
        "names": [argument.name for argument in lowered.arguments],
    }
    place = compiled_store.place_of(lowered.stablehlo, topology, options)
    known = compiled_store.kept(place) if place is not None else None
    if known is not None:
        return known
    compiled: Compiled = _in_child(_COMPILE, pickle.dumps((lowered.stablehlo, topology, options)), timeout_s)
    if place is not None:
        compiled_store.keep(place, compiled)
    return compiled


def _in_child(module: str, request: bytes, timeout_s: float) -> Any:
    """Run a worker on a request and return its answer, or raise what it raised."""
    _check_packages()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kpt-ahead-") as scratch:
        given, answer = Path(scratch, "request"), Path(scratch, "answer")
        given.write_bytes(request)
        with Path(scratch, "log").open("w+b") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", module, str(given), str(answer)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
                start_new_session=True,
            )
            try:
                code = child.wait(timeout_s)
            except subprocess.TimeoutExpired:
                raise AheadError(f"{_what(module)} took longer than {timeout_s:g} s") from None
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
            log.seek(0)
            said = log.read().decode(errors="replace")
        if not answer.exists():
            raise AheadError(f"{_what(module)} {_ended(code)} after {time.monotonic() - began:.0f} s: {_last(said)}")
        result = pickle.loads(answer.read_bytes())  # noqa: S301  written by our own child
    if isinstance(result, BaseException):
        raise result
    return result


def _check_packages() -> None:
    """Raise what would end a child before it says anything: versions that do not go together."""
    found = replace(packages.installation(), environment=_environment())
    for problem in packages.problems(found):
        if packages.Use.AHEAD_OF_TIME in problem.blocks:
            raise KptError(problem.reason, fix=problem.fix)


_OF_EMULATION = ("TPU_LIBRARY_PATH", "PJRT_SHIM_REAL")


def _environment() -> dict[str, str]:
    paths = dict.fromkeys(os.path.abspath(p) for p in sys.path)  # noqa: PTH100  an empty entry is the cwd
    # Where this process emulates a TPU, jax would take the CPU plugin that it names for the TPU's compiler.
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_EMULATION}
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(paths),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def _what(module: str) -> str:
    return "the TPU compiler" if module == _COMPILE else "tracing and lowering"


def _ended(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    return f"died by {signal.Signals(-code).name}"


def _last(said: str) -> str:
    """Return the last lines that say something: a fatal check if there is one, else the end."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    fatal = [line for line in lines if line.startswith(("F0000", "F1")) or "Check failed" in line or "Error:" in line]
    return (fatal or lines or ["no output"])[-1][:500]
