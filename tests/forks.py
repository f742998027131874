"""Processes that have imported torch: `python -m MODULE` or `python FILE`, forked from one that started before.

Importing what `kpt` or a kernel under Triton's interpreter needs takes seconds, and hundreds of tests start such a
process. A fork of a process that has imported it, and has computed nothing with it, differs from a new one in nothing
that such a test looks at: it has its own arguments, environment, directory, standard streams and end. What depends on
the start itself (what is imported, how long that takes, signals) is tested with processes of its own.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

__all__ = ["python", "run_interpreted"]

_SERVER = """
import atexit, gc, importlib, json, os, runpy, sys, threading, traceback

for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked"
gc.freeze()  # what is imported is no garbage: collections need not look at it
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
requests = os.fdopen(os.dup(0), "r")
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
answers.write("ready\\n")
answers.flush()
while line := requests.readline():
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    answers.write(f"{child}\\n")
    answers.flush()
    answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\\n")
    answers.flush()
else:
    sys.exit()
requests.close()
answers.close()
os.chdir(asked["cwd"])
os.environ.clear()
os.environ.update(asked["env"])
for number, name in ((1, "stdout"), (2, "stderr")):
    os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
first, *rest = asked["arguments"]
code = 0
try:
    if first == "-m":
        sys.path[0] = asked["cwd"]
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(first)
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")
except SystemExit as end:
    if end.code is not None and not isinstance(end.code, int):
        print(end.code, file=sys.stderr)
        code = 1
    else:
        code = end.code or 0
except BaseException:
    traceback.print_exc()
    code = 1
# The end of a process, but for taking its modules down, which takes a second where torch is among them.
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""


class _Server:
    """A process that has imported some modules, and forks one process at a time."""

    def __init__(self, modules: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, json.dumps(modules)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        atexit.register(self.close)
        assert self._read(120) == "ready"

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        with self.process:
            pass  # closes the pipes, and waits

    def _read(self, timeout: float | None) -> str | None:
        """Return the next line of the server; `None` where it did not come in time."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout):
                return None
        # One character at a time: what a buffer held, the selector would not see.
        line = b""
        while not line.endswith(b"\n"):
            line += (read := os.read(self.process.stdout.fileno(), 1))
            assert read, "the server of forks has ended"
        return line.decode().strip()

    def run(
        self, arguments: list[str], cwd: Path, environment: Mapping[str, str], timeout: float | None
    ) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory(prefix="kpt-forks-") as scratch:
            streams = {name: os.path.join(scratch, name) for name in ("stdout", "stderr")}  # noqa: PTH118
            asked = {"arguments": arguments, "cwd": str(cwd), "env": dict(environment), **streams}
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(asked).encode() + b"\n")
            self.process.stdin.flush()
            child = int(self._read(60) or 0)
            code = self._read(timeout)
            if code is None:
                os.kill(child, signal.SIGKILL)
                self._read(60)
            out, err = (Path(path).read_text() for path in streams.values())
        if code is None:
            raise subprocess.TimeoutExpired(arguments, timeout or 0, out, err)
        return subprocess.CompletedProcess(arguments, int(code), out, err)


@functools.cache
def _server(modules: tuple[str, ...], fixed: tuple[tuple[str, str], ...]) -> _Server:
    return _Server(modules, {**os.environ, **dict(fixed)})


KPT = ("torch", "torch._dynamo", "torch.export", "numpy", "scipy.stats", "pydantic", "click", "rich", "jinja2")


def python(
    *arguments: str | Path,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    modules: tuple[str, ...] = KPT,
    fixed: Mapping[str, str] | None = None,
    timeout: float | None = 280,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ...` or `python FILE ...` in a fork of a process that has imported `modules`.

    Args:
        arguments: As Python takes them.
        cwd: Working directory; the current one if not given.
        environment: Variables that are added to this process's.
        modules: What has been imported; a process for each set of them lives as long as this one.
        fixed: Variables that have to be set before the imports. All these processes have `OMP_NUM_THREADS=1`.
        timeout: Seconds after which the process is killed.

    Raises:
        subprocess.TimeoutExpired: It took longer.
    """
    fixed = {"OMP_NUM_THREADS": "1", **(fixed or {})}  # more, and importing numpy starts threads
    server = _server(modules, tuple(sorted(fixed.items())))
    return server.run(
        [str(a) for a in arguments], cwd or Path.cwd(), {**os.environ, **fixed, **(environment or {})}, timeout
    )


def run_interpreted(path: str, timeout: float = 250) -> None:
    """Run the tests of a module that take `interpreter`; all must pass, and there must be some."""
    pytest.importorskip("triton", reason="triton is not installed")
    done = python(
        *("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path),
        modules=("pytest", "torch", "torch._dynamo", "torch.testing._internal.optests", "triton"),
        fixed={"TRITON_INTERPRET": "1"},
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout[-2000:]
    assert int(passed[1]) > 0
