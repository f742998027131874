"""Runs a function in a process of its own, so that a crash, a hang or running out of memory is an outcome.

`Workers` talks to a fork server (`measure.zygote`) that has only imported, so a job starts in milliseconds, the
user's `__main__` is never imported again, and it works from standard input, notebooks and threads. See the zygote's
docstring for the processes that take part.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Any, Self

from kernel_pytorch.core.types import Status
from kernel_pytorch.errors import KptError
from kernel_pytorch.measure.parcel import TravelError, pack, unpack

__all__ = ["Outcome", "TravelError", "Workers", "WorkersUnavailableError", "pack", "unpack"]

log = logging.getLogger(__name__)

_LOG_TAIL_BYTES = 16_384
_DYING_LIMIT_S = 2.0
_START_LIMIT_S = 180.0
_GRACE_S = 20.0
_READ_AT_IMPORT = (
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "LD_", "MALLOC_"),
    *("TORCH", "PYTORCH_", "ATEN_", "DNNL_", "ONEDNN_", "CUDA_", "HIP_", "ROCR_", "NVIDIA_"),
)
"""Prefixes of the variables that libraries read once, when they are loaded."""


class WorkersUnavailableError(KptError):
    """No worker can be started on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended.

    Attributes:
        status: `ok`; `failed` (an exception, or died by a signal); `timeout`; `oom`.
        value: What the function returned; empty unless `ok`.
        reason: One line; empty if `ok`.
        seconds: Wall time, the fork included.
        log_tail: The end of what it printed, its traceback included.
    """

    status: Status
    value: str = ""
    reason: str = ""
    seconds: float = 0.0
    log_tail: str = ""


@dataclass(slots=True)
class _Zygote:
    process: subprocess.Popen[bytes]
    control: socket.socket
    output: IO[bytes]
    environment: dict[str, str]
    ready: bool = False

    def stop(self) -> None:
        """End the fork server; its supervisors end their jobs."""
        self.control.close()
        try:
            self.process.wait(2.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.output.close()


def _sensitive() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k.startswith(_READ_AT_IMPORT)}


class Workers:
    """A source of worker processes, one per job; a context manager.

    Threads may share it. The fork server starts on entry (its imports overlap with the caller's work), is started
    again when it dies or when a variable that libraries read at import has changed, and ends with this process
    however this process ends.

    Args:
        preload: Modules the fork server imports once. They must start no thread that a job needs.
    """

    def __init__(self, preload: Sequence[str] = ("torch",)) -> None:
        self.preload = tuple(preload)
        self._zygote: _Zygote | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        with self._lock:
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the fork server and every job."""
        with self._lock:
            if self._zygote is not None:
                self._zygote.stop()
                self._zygote = None

    def run(self, function: str, payload: bytes, *, timeout_s: float, memory_limit_bytes: int | None = None) -> Outcome:
        """Call `function(payload)` in a fresh process and wait for its end.

        Args:
            function: `package.module:name`, imported in the worker with this process's `sys.path`, working
                directory and environment; takes bytes, returns a string of at most 64 MiB.
            payload: Its argument.
            timeout_s: Deadline; then everything the job started is killed.
            memory_limit_bytes: Anonymous and shared memory that the job and all it started may hold together.
                Pages of mapped files (see `unpack`) do not count: workers share them.

        Returns:
            The outcome; nothing that the job does raises here.

        Raises:
            WorkersUnavailableError: No worker can be started.
        """
        began = time.monotonic()
        request = {
            "function": function,
            "timeout_s": timeout_s,
            "memory_limit_bytes": memory_limit_bytes,
            "env": dict(os.environ),
            "cwd": os.getcwd(),  # noqa: PTH109
            "path": [*sys.path],
            "parent": os.getpid(),
        }
        for _ in range(3):
            job = _Job(json.dumps(request).encode("utf-8", "surrogateescape"), payload)
            try:
                zygote, sent = self._launch(job)
                if sent and job.wait(timeout_s + _GRACE_S):
                    return job.outcome(time.monotonic() - began, request)
                # It is dying, and for a moment may not look dead: three tries would all be handed to it.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    zygote.process.wait(_DYING_LIMIT_S)
            finally:
                job.close()
        raise WorkersUnavailableError("the fork server died three times before it started the job")

    def _launch(self, job: _Job) -> tuple[_Zygote, bool]:
        """Hand the job to the fork server; return it, and False if it has died."""
        with self._lock:
            zygote = self._alive()
            try:
                socket.send_fds(zygote.control, [b"j"], job.remote)
            except OSError:
                return zygote, False
        job.close_remote()
        return zygote, True

    def _alive(self) -> _Zygote:
        zygote = self._zygote
        if zygote is not None and (zygote.process.poll() is not None or zygote.environment != _sensitive()):
            zygote.stop()
            zygote = self._zygote = None
        if zygote is None:
            zygote = self._start()
        if not zygote.ready:
            _await_ready(zygote)
        return zygote

    def _start(self) -> _Zygote:
        if self._zygote is not None:
            return self._zygote
        if not hasattr(os, "pipe2") or not hasattr(socket, "send_fds"):
            raise WorkersUnavailableError(f"worker processes need Linux, this is {sys.platform}")
        ours, theirs = socket.socketpair()
        output = tempfile.TemporaryFile()  # noqa: SIM115  closed by stop
        paths = dict.fromkeys(os.path.abspath(p) for p in sys.path)  # noqa: PTH100  an empty entry is the cwd
        command = [sys.executable, "-m", "kernel_pytorch.measure.zygote", str(theirs.fileno()), str(os.getpid())]
        with theirs:
            try:
                process = subprocess.Popen(
                    [*command, *self.preload],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                )
            except OSError as error:
                ours.close()
                output.close()
                raise WorkersUnavailableError(f"cannot start {sys.executable}: {error}") from error
        self._zygote = _Zygote(process, ours, output, _sensitive())
        return self._zygote


def _await_ready(zygote: _Zygote) -> None:
    zygote.control.settimeout(_START_LIMIT_S)
    answer = b""
    with contextlib.suppress(OSError):
        while not answer.endswith(b"\n"):
            part = zygote.control.recv(65536)
            if not part:
                break
            answer += part
    if not answer.endswith(b"\n"):
        zygote.process.kill()
        zygote.process.wait()
        zygote.output.seek(0)
        said = zygote.output.read()[-2000:].decode(errors="replace").strip() or "no output"
        raise WorkersUnavailableError(f"the fork server did not start: {said.splitlines()[-1]}")
    zygote.output.seek(0)
    for line in zygote.output.read().decode(errors="replace").splitlines():
        log.debug("fork server: %s", line)
    for name, why in json.loads(answer)["missing"].items():
        log.warning("workers could not import %s beforehand: %s", name, why)
    zygote.control.settimeout(10.0)
    zygote.ready = True


def _file_with(content: bytes) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115  closed by the job
    file.write(content)
    file.flush()
    file.seek(0)
    return file


@dataclass(slots=True)
class _Job:
    """The parent's ends of one job's five descriptors."""

    request: bytes
    payload: bytes
    result: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    answer: dict[str, Any] | None = None
    started: bool = False
    remote: list[int] = field(default_factory=list)
    _tail: deque[bytes] = field(default_factory=deque)
    _files: list[Any] = field(default_factory=list)
    _log_fd: int = -1
    _status: socket.socket | None = None
    _said: bytes = b""

    def __post_init__(self) -> None:
        request, payload = _file_with(self.request), _file_with(self.payload)
        log_read, log_write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(log_read, False)
        mine, theirs = socket.socketpair()
        mine.settimeout(0.0)
        self._log_fd, self._status = log_read, mine
        self._files = [request, payload, theirs, os.fdopen(log_write, "wb", buffering=0)]
        self.remote = [request.fileno(), payload.fileno(), self.result.fileno(), log_write, theirs.fileno()]

    def close_remote(self) -> None:
        """Close what now belongs to the worker, so that its end is noticed."""
        for file in self._files:
            file.close()
        self._files = []

    def close(self) -> None:
        """Close everything; a job that still runs is killed by its supervisor."""
        self.close_remote()
        self.result.close()
        if self._status is not None:
            self._status.close()
            os.close(self._log_fd)
            self._status = None

    def wait(self, limit_s: float) -> bool:
        """Collect log and answer until the job has ended; False if it never started.

        The job wrote its log before its supervisor answers, and one read empties a pipe: nothing is left behind.
        """
        assert self._status is not None
        deadline = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._status, selectors.EVENT_READ)
            selector.register(self._log_fd, selectors.EVENT_READ)
            while self._status in selector.get_map() and (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    more = self._hear() if key.fileobj is self._status else self._read_log()
                    if not more:
                        selector.unregister(key.fileobj)
        return self.started

    def _hear(self) -> bool:
        assert self._status is not None
        try:
            part = self._status.recv(65536)
        except OSError:
            return False
        self._said += part
        *lines, self._said = self._said.split(b"\n")
        for line in lines:
            if line == b"started":
                self.started = True
            else:
                self.answer = json.loads(line)
        return bool(part) and self.answer is None

    def _read_log(self) -> bool:
        try:
            part = os.read(self._log_fd, 65536)
        except OSError:
            return False
        self._tail.append(part)
        while sum(map(len, self._tail)) - len(self._tail[0]) > _LOG_TAIL_BYTES:
            self._tail.popleft()
        return bool(part)

    def outcome(self, seconds: float, request: Mapping[str, Any]) -> Outcome:
        """Return how the job ended."""
        tail = b"".join(self._tail)[-_LOG_TAIL_BYTES:].decode(errors="replace")
        if self.answer is None:
            status, text = Status.FAILED, "the worker and its supervisor were killed from outside"
        elif self.answer["cause"]:
            status, text = _KILLED[self.answer["cause"]]
            text = text.format_map(request)
        elif self.answer["code"] < 0:
            status, text = _died(-self.answer["code"], kernel_oom=self.answer["kernel_oom"])
        else:
            status, text = self._result(self.answer["code"])
        value, reason = (text, "") if status is Status.OK else ("", text)
        return Outcome(status, value, reason, seconds, tail)

    def _result(self, code: int) -> tuple[Status, str]:
        self.result.seek(0)
        head, separator, body = self.result.read().partition(b"\n")
        if code or not separator:
            return Status.FAILED, f"exited with code {code} before it had a result"
        return Status(head.decode()), body.decode("utf-8", "surrogatepass")


_KILLED = {
    "timeout": (Status.TIMEOUT, "no result within {timeout_s:g} s"),
    "memory": (Status.OOM, "held more than its memory limit of {memory_limit_bytes:,} bytes"),
    "cancelled": (Status.FAILED, "cancelled: its workers were closed"),
}


def _died(number: int, *, kernel_oom: bool) -> tuple[Status, str]:
    if kernel_oom and number == signal.SIGKILL:
        return Status.OOM, "killed by the kernel: the machine or its container ran out of memory"
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "real-time signal"
    return Status.FAILED, f"died by signal {number} ({name})"
