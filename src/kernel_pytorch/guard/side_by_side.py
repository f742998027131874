"""One side of a comparison, and the worker process that runs it: loads it, takes samples, tells what is known of it."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import operator
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from kernel_pytorch.errors import KptError
from kernel_pytorch.guard.environments import (
    EnvironmentUnusableError,
    find_python,
    install_command,
    look_at,
    require,
    variables,
)
from kernel_pytorch.guard.processes import Said, SideFailed, end_tree, how_it_ended, start
from kernel_pytorch.guard.types import SideFacts

__all__ = [
    "Limits",
    "NotComparableError",
    "Runner",
    "Side",
    "SideError",
    "WorkerRunner",
    "check_same",
]

_WORKER = Path(__file__).with_name("worker.py")
_BOOT = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; import runpy; sys.argv.pop(0); "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)
"""Starts the worker without its directory on `sys.path`: modules beside it have names of the standard library."""
_HANG_FACTOR = 50.0
_POLL_S = 0.5


class NotComparableError(KptError):
    """The two sides are not the same work: another model, other inputs, another device."""


class SideError(KptError):
    """A side's own process refused what it was given: a target, inputs, a plan.

    Attributes:
        label: The side.
        kind: Class of the error there: `TargetError`, `PlanError`, `CandidateError` ...
    """

    def __init__(self, label: str, kind: str, message: str, *, fix: str = "", user_traceback: str = "") -> None:
        super().__init__(f"{label}: {message}", fix=fix, user_traceback=user_traceback)
        self.label = label
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison: what runs, with which interpreter, in which directory.

    Attributes:
        label: `base`, `head`, `unmodified`, `plan` or what the user calls it.
        target: What `kpt` takes as TARGET; or `command`.
        command: A command that prints times in milliseconds, one number a line.
        python: The interpreter; `None` is this one. Of a command, the one that comes first on its PATH.
        directory: Working directory; `None` is this process's.
        pythonpath: What comes first on the PYTHONPATH.
        mode: `inference`, or `training`: a sample is a whole step then.
        plan: A plan, or the directory of its search, that is applied to the model.
        env: Variables of its own.
        per_line: Whether each line that a command prints is a sample, rather than their median.
        trust_remote_code: Whether code that comes with a model may run.
        trust_artifacts: Whether code in the plan's `artifacts/` may be loaded.
        revision: Full commit, where known.
        dirty: Whether there were changes that no commit holds.
        avoid: A checkout that no module of this side may come from (it has a worktree of its own).
    """

    label: str
    target: str | None = None
    command: tuple[str, ...] | None = None
    python: str | None = None
    directory: Path | None = None
    pythonpath: tuple[str, ...] = ()
    mode: str = "inference"
    plan: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    per_line: bool = False
    trust_remote_code: bool = False
    trust_artifacts: bool = False
    revision: str = ""
    dirty: bool = False
    avoid: Path | None = None

    def __post_init__(self) -> None:
        if (self.target is None) == (self.command is None):
            raise KptError(f"side {self.label!r} needs a target or a command, one of the two")
        if self.mode not in ("inference", "training"):
            raise KptError(f"mode must be inference or training, got {self.mode!r}")

    @property
    def environment(self) -> dict[str, str]:
        """Variables of its process."""
        return variables(self.python, self.pythonpath, self.env, own_path=self.command is None, avoid=self.avoid)


@dataclass(frozen=True, slots=True)
class Limits:
    """How long things may take, in seconds.

    Attributes:
        sampling: Warm-up and sampling together; one block of four always runs.
        loading: From the start of a process to the end of its first call: imports, building, compiling.
        hang: A call that takes this long, or 50 times what it took before if that is more, hangs.
    """

    sampling: float = 120.0
    loading: float = 900.0
    hang: float = 60.0


class Runner(Protocol):
    """Takes samples of one side."""

    side: Side

    def load(self, limits: Limits) -> None:
        """Start, and run what runs only once."""
        ...

    def sample(self) -> Sequence[float]:
        """Take a sample, or several that belong together, in milliseconds."""
        ...

    def facts(self) -> SideFacts:
        """Return what is known of the side."""
        ...

    def close(self) -> None:
        """End its process with all it has started."""
        ...


class WorkerRunner:
    """One side with a target: a worker process that holds the model.

    Args:
        side: The side.
    """

    def __init__(self, side: Side) -> None:
        self.side = side if side.python is None else replace(side, python=find_python(side.python))
        self.told: dict[str, Any] = {}
        self.calls: dict[str, int] = {}
        self.call_ms: dict[str, float] = {}
        self.telemetry: dict[str, list[float]] = {}
        self.counts: dict[str, float] = {}
        self.core: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._said: Said | None = None
        self._requests = self._answers = -1
        self._buffer = b""
        self._hang_s = 0.0

    def begin(self) -> None:
        """Start the worker and let it import torch, without waiting for it.

        Raises:
            EnvironmentUnusableError: Its interpreter lacks what it needs.
        """
        if self.side.python is not None:
            require(look_at(self.side.python, self.side.environment), self.side.label)
        self._start()
        names = ("torch", "torch._dynamo") if self.side.mode == "training" else ("torch",)
        with contextlib.suppress(OSError):  # it has ended; reading says how
            self._send({"op": "import", "names": names})

    def load(self, limits: Limits) -> None:
        """Let the worker, which is started where `begin` has not done so, load and call its workload.

        Raises:
            EnvironmentUnusableError: Its interpreter lacks what it needs.
            SideError: The target or the plan is refused.
            SideFailed: It crashed, hung or raised.
        """
        self._hang_s = limits.hang
        if self._process is None:
            self.begin()
        self._read(limits.loading, "starting")
        self._read(limits.loading, "loading")
        side = self.side
        self.told = self._ask(
            {
                "op": "load",
                "target": side.target,
                "mode": side.mode,
                "plan": side.plan,
                "trust_remote_code": side.trust_remote_code,
                "trust_artifacts": side.trust_artifacts,
                "forbid": None if side.avoid is None else str(side.avoid),
            },
            limits.loading,
            "loading",
        )

    def _start(self) -> None:
        their_in, self._requests = os.pipe()
        self._answers, their_out = os.pipe()
        python = self.side.python or sys.executable
        command = [python, "-c", _BOOT, str(_WORKER), str(their_in), str(their_out), str(os.getpid())]
        try:
            self._process = start(
                command,
                directory=self.side.directory,
                environment=self.side.environment,
                pass_fds=(their_in, their_out),
                stderr=subprocess.STDOUT,
            )
        finally:
            os.close(their_in)
            os.close(their_out)
        assert self._process.stdout is not None
        self._said = Said(self._process.stdout)

    def _ask(self, request: Mapping[str, Any], limit_s: float, doing: str) -> dict[str, Any]:
        with contextlib.suppress(OSError):  # it has ended; reading says how
            self._send(request)
        return self._read(limit_s, doing)

    def _send(self, request: Mapping[str, Any]) -> None:
        os.write(self._requests, json.dumps(request).encode() + b"\n")

    def _read(self, limit_s: float, doing: str) -> dict[str, Any]:
        """Return the next answer, or raise what it says."""
        assert self._process is not None
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._failed(f"no answer within {limit_s:.0f} s while {doing}")
            if select.select([self._answers], [], [], min(left, _POLL_S))[0]:
                part = os.read(self._answers, 1 << 20)
                self._buffer += part
                if part:
                    continue
            elif self._process.poll() is None:
                continue
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5.0)
            code = self._process.returncode
            raise self._failed(f"{'closed its pipe' if code is None else how_it_ended(code)} while {doing}")
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise self._as_error(answer["error"], doing)
        told: dict[str, Any] = answer["ok"]
        return told

    def _failed(self, reason: str, trace: str = "") -> SideFailed:
        tail = trace.strip() or (self._said.tail(0.2) if self._said is not None else "")
        return SideFailed(f"{self.side.label}: {reason}", tail)

    def _as_error(self, error: Mapping[str, Any], doing: str) -> Exception:
        label, message, kind = self.side.label, error["message"], error["kind"]
        python = self.side.python or sys.executable
        if kind == "missing":
            fix = install_command(python, [message])
            if message in ("torch", "kernel_pytorch"):
                return EnvironmentUnusableError(f"{label}: {python} has no {message}", fix=fix)
            return SideError(label, kind, f"{python} has no {message}, which it needs here", fix=fix)
        if kind == "old":
            return SideError(label, kind, f"kernel_pytorch there is too old: {message}")
        if kind == "stray":
            return SideError(
                label,
                kind,
                f"runs code of the checkout itself, not of its revision: {message}",
                fix="put the package under src/ or at the root of the repository, or install it without -e",
            )
        if kind == "usage":
            fix, trace = error["fix"], error["trace"]
            return SideError(label, error["class"], message, fix=fix, user_traceback=trace)
        what = "ran out of memory" if kind == "memory" else "raised"
        return self._failed(f"{what} while {doing}: {error['class']}: {message}", error["trace"])

    def warm_up(self, limit_s: float) -> float:
        """Call every case once and return the milliseconds of all."""
        told: dict[str, float] = self._ask({"op": "call"}, max(limit_s, self._hang_s), "warming up")["ms"]
        for case, ms in told.items():
            self.call_ms[case] = min(self.call_ms.get(case, math.inf), ms)
        return sum(told.values())

    def sample(self) -> Sequence[float]:
        """Take one sample: the weighted time of so many calls of each case, on the core `self.core` if there is one."""
        expected_s = sum(self.call_ms[case] * calls for case, calls in self.calls.items()) / 1e3
        request = {"op": "sample", "calls": self.calls, "ms": self.call_ms, "core": self.core}
        told = self._ask(request, max(self._hang_s, _HANG_FACTOR * expected_s), "being timed")
        for name, value in told.get("telemetry", {}).items():
            self.telemetry.setdefault(name, []).append(float(value))
        self.core = told["core"]
        return (float(told["ms"]),)

    def complete(self, names: Iterable[str]) -> None:
        """Ask for the versions of what the other side has told of: what is imported by one is installed for both."""
        software = self.told["software"]
        missing = sorted(name for name in names if name not in software and ":" not in name)
        if missing:
            self.told["software"] = self._ask({"op": "versions", "names": missing}, self._limit_s, "looking around")[
                "software"
            ] | dict(software)

    def count(self) -> None:
        """Ask what happened while it was sampled: recompilations, retries of the allocator, load of others."""
        told = self._ask({"op": "counts"}, self._limit_s, "counting")["counts"]
        self.counts = {name: float(value) for name, value in told.items()}

    def peak_bytes(self) -> int | None:
        """Run every case once more; return the most memory that one of them took, with the model; `None` if unknown."""
        peak: int | None = self._ask({"op": "peak"}, self._limit_s, "measuring its memory")["peak_bytes"]
        return peak

    def kernels_ms(self) -> Mapping[str, float]:
        """Return the time of one call by kernel or operator; see `guard.profile`."""
        kernels: dict[str, float] = self._ask({"op": "profile"}, 2 * self._limit_s, "being profiled")["kernels_ms"]
        return kernels

    @property
    def _limit_s(self) -> float:
        return max(self._hang_s, _HANG_FACTOR * sum(self.call_ms.values()) / 1e3)

    def facts(self) -> SideFacts:
        """Return what the worker has told."""
        telemetry = {name: statistics.median(values) for name, values in self.telemetry.items()}
        telemetry.pop("cpu_others_percent", None)  # the other side is among the others
        if reasons := self.telemetry.get("throttle_reasons"):  # bits: each counts that was ever set
            telemetry["throttle_reasons"] = float(functools.reduce(operator.or_, map(int, reasons)))
        if capacity := self.told.get("memory_total_bytes"):
            telemetry["memory_total_bytes"] = float(capacity)
        telemetry |= self.counts
        settings = {f"env:{name}": value for name, value in self.side.env.items()}
        for case, ms in self.told.get("first_ms", {}).items():
            telemetry[f"first_call_ms {case}" if len(self.call_ms) > 1 else "first_call_ms"] = float(ms)
        return SideFacts(
            label=self.side.label,
            revision=self.side.revision,
            dirty=self.side.dirty,
            python=self.side.python or sys.executable,
            software={**self.told.get("software", {}), **settings},
            device_key=self.told.get("device_key", ""),
            fingerprint=self.told.get("fingerprint", ""),
            telemetry=telemetry,
        )

    def close(self) -> None:
        """End the worker."""
        if self._process is not None:
            end_tree(self._process)
            self._process = None
        for descriptor in (self._requests, self._answers):
            if descriptor >= 0:
                os.close(descriptor)
        self._requests = self._answers = -1


def check_same(base: WorkerRunner, head: WorkerRunner) -> None:
    """Refuse two sides that do not do the same work.

    Raises:
        NotComparableError: Another device, model or inputs.
    """
    names = [runner.side.label for runner in (base, head)]
    keys = [runner.told["device_key"] for runner in (base, head)]
    if keys[0] != keys[1]:
        raise NotComparableError(
            f"the sides run on different devices: {names[0]} on {keys[0]}, {names[1]} on {keys[1]}",
            fix="check that both environments have a torch build for the device",
        )
    lines = [runner.told["structure"] for runner in (base, head)]
    if lines[0] == lines[1]:
        return
    pair = next(
        ((a, b) for a, b in zip(*lines, strict=False) if a != b),
        tuple(one[min(map(len, lines))] if len(one) > min(map(len, lines)) else "nothing more" for one in lines),
    )
    what = "inputs" if pair[0].startswith("inputs of case") and pair[1].startswith("inputs of case") else "models"
    raise NotComparableError(
        f"the sides have different {what}: {names[0]} has {pair[0]!r}, {names[1]} has {pair[1]!r}",
        fix="name targets that build the same model with the same inputs on both sides",
    )
