"""Processes that leave nothing behind: a session of their own, the end of what they said kept, killed as a whole."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

import psutil

from kernel_pytorch.errors import KptError

__all__ = ["Said", "SideFailed", "end_tree", "how_it_ended", "start", "terminable"]

_KEPT_BYTES = 16_384
_TAIL_LINES = 12


class SideFailed(Exception):  # noqa: N818  an outcome of a measurement, which becomes a verdict
    """A side crashed, hung or raised: the comparison is INCONCLUSIVE, whatever was sampled so far is kept.

    Attributes:
        reason: One sentence.
        tail: The end of what the side said on its standard error; may be empty.
    """

    def __init__(self, reason: str, tail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.tail = tail


class Said:
    """Reads a stream to its end and keeps the last 16 KiB: a process that talks must never block on a full pipe."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._parts: deque[bytes] = deque()
        self._thread = threading.Thread(target=self._read, name="guard-said", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._stream as stream:
            while part := os.read(stream.fileno(), 65536):
                self._parts.append(part)
                while sum(map(len, self._parts)) - len(self._parts[0]) > _KEPT_BYTES:
                    self._parts.popleft()

    def tail(self, wait_s: float = 1.0) -> str:
        """Return the last lines; waits a moment for a process that has ended to be read to its end."""
        self._thread.join(wait_s)
        text = b"".join(self._parts)[-_KEPT_BYTES:].decode(errors="replace").strip()
        return "\n".join(text.splitlines()[-_TAIL_LINES:])


def start(
    command: Sequence[str],
    *,
    directory: Path | None,
    environment: Mapping[str, str],
    pass_fds: Sequence[int] = (),
    stdout: int = subprocess.PIPE,
    stderr: int = subprocess.PIPE,
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, so that a Ctrl-C in the terminal reaches this process alone.

    Raises:
        KptError: It cannot be started.
    """
    try:
        return subprocess.Popen(
            [*command],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=directory,
            env=dict(environment),
            pass_fds=tuple(pass_fds),
            start_new_session=True,
        )
    except OSError as error:
        where = f" in {directory}" if directory is not None and not directory.is_dir() else ""
        raise KptError(
            f"cannot start {command[0]}{where}: {error.strerror or error}", fix="check the path, or give it in full"
        ) from error


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with all it has started, and reap it."""
    victims: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        victims = psutil.Process(process.pid).children(recursive=True)
    if process.returncode is None or victims:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    for victim in victims:
        with contextlib.suppress(psutil.Error):
            victim.kill()
    process.wait()
    psutil.wait_procs(victims, timeout=5.0)


def how_it_ended(code: int) -> str:
    """Return a return code in words."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "a real-time signal"
    hint = " (often the kernel, for lack of memory)" if -code == signal.SIGKILL else ""
    return f"died by signal {-code} ({name}){hint}"


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM unwind the stack, as Ctrl-C does, so that what must be ended or removed is.

    Outside the main thread, or where the program has a handler of its own, nothing is changed.
    """

    def leave(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
