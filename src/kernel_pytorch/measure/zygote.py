"""The fork server behind `Workers`: imports once, forks one supervised child per job, runs nothing itself.

Started as `python -m kernel_pytorch.measure.zygote FD PARENT_PID MODULE...`; `FD` is a socket on which the parent
passes five file descriptors per job (request, payload, result, log, status). Three processes take part:

- the *zygote* (this module as `__main__`) only imports and forks; it ends with its parent;
- a *supervisor* per job, single-threaded, is the reaper of everything the job starts. It keeps deadline and memory
  limit, and kills the whole tree, processes in sessions of their own included. It answers the parent directly, so a
  job outlives a killed zygote, and takes the job down when the parent goes away;
- the *job*, an ordinary main thread in a session of its own, first in line for the kernel's out-of-memory killer.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import IO, Any, NoReturn

__all__ = ["main"]

RESULT_LIMIT_BYTES = 64 << 20
_POLL_S = 0.05
_DESCRIPTORS = 5
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "cannot allocate memory")


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# --- the job ---------------------------------------------------------------------------------------------------


def _resolve(function: str) -> Any:
    module, _, name = function.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | OSError) and any(t in str(error).lower() for t in _OUT_OF_MEMORY)


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""


def _call(request: dict[str, Any], payload: bytes) -> tuple[str, str]:
    """Return `(status, text)` of the job's function; what it raises is printed to the log in full."""
    try:
        value = _resolve(request["function"])(payload)
        if not isinstance(value, str):
            return "failed", f"{request['function']} returned {type(value).__name__}, expected str"
        size = len(value.encode("utf-8", "surrogatepass"))
        if size > RESULT_LIMIT_BYTES:
            return "failed", f"result of {size} bytes is above the limit of {RESULT_LIMIT_BYTES}"
    except BaseException as error:  # noqa: BLE001  a foreign model may raise anything, SystemExit included
        traceback.print_exc()
        text = str(error).strip() or "no message"
        return ("oom" if _is_out_of_memory(error) else "failed"), f"{type(error).__name__}: {text}{_where(error)}"
    return "ok", value


def _enter_job(request: dict[str, Any], log_fd: int) -> None:
    """Make this fresh fork an ordinary process: own session, plain signals, the parent's paths and environment."""
    os.setsid()
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  descriptors, for the whole life
    sys.stdout, sys.stderr = (
        open(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        for fd in (1, 2)
    )
    faulthandler.enable(file=sys.stderr)
    with contextlib.suppress(OSError):  # not Linux, or a sandbox that forbids it: only a hint to the kernel
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[:] = request["path"]
    sys.argv[:] = [request["function"]]
    importlib.invalidate_caches()


def _run_job(request: dict[str, Any], supervisor: int, payload_fd: int, result_fd: int, log_fd: int) -> NoReturn:
    code = 1
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(1)
        _enter_job(request, log_fd)
        with os.fdopen(payload_fd, "rb") as stream:
            payload = stream.read()
        status, text = _call(request, payload)
        with os.fdopen(result_fd, "wb") as out:
            out.write(f"{status}\n".encode())
            out.write(text.encode("utf-8", "surrogatepass"))
        code = 0
    except BaseException:  # noqa: BLE001  nothing may return into the supervisor's code
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


# --- the supervisor --------------------------------------------------------------------------------------------


def _children(pid: int) -> list[int]:
    """Return the live and dead children of a process, of all its threads."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208  polled: a Path costs ten times as much
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children", "rb") as file:  # noqa: PTH123
                found += map(int, file.read().split())
    return found


def _tree(pid: int) -> list[int]:
    """Return all descendants of a process, nearest first."""
    found, waiting = [], _children(pid)
    while waiting:
        found += waiting
        waiting = [c for p in waiting for c in _children(p)]
    return found


def _anonymous_bytes(pid: int) -> int:
    """Return what a process holds for itself: anonymous and shared memory, not pages of mapped files."""
    total = 0
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb") as file:  # noqa: PTH123
        for line in file:
            if line.startswith((b"RssAnon:", b"RssShmem:")):
                total += int(line.split()[1]) * 1024
    return total


def _kernel_oom_kills() -> int:
    """Return how many processes the kernel has killed for memory since it started; 0 where it does not tell."""
    with contextlib.suppress(OSError), open("/proc/vmstat", "rb") as file:  # noqa: PTH123
        for line in file:
            if line.startswith(b"oom_kill "):
                return int(line.split()[1])
    return 0


def _kill_tree(limit_s: float = 10.0) -> int | None:
    """Kill and reap all descendants of this process; return the wait status of the first child reaped."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        victims = _tree(os.getpid())
        for pid in victims:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return None
        time.sleep(0.002)
    return None


def _watch(request: dict[str, Any], job: int, status: socket.socket, wake: IO[bytes]) -> str:
    """Wait for the end of the job; return why it must be killed, or an empty string where it ended by itself."""
    deadline = time.monotonic() + request["timeout_s"]
    limit = request["memory_limit_bytes"]
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return "timeout"
        sources: list[Any] = [status, wake]
        readable, _, _ = select.select(sources, [], [], min(left, _POLL_S if limit else 1.0))
        if wake in readable:
            wake.read(4096)
        if os.waitid(os.P_PID, job, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return ""
        if status in readable or not _alive(request["parent"]):
            return "cancelled"
        if limit and sum(map(_anonymous_bytes, _tree(os.getpid()))) > limit:
            return "memory"


def _supervise(request: dict[str, Any], fds: list[int], wake: IO[bytes]) -> None:
    _, payload_fd, result_fd, log_fd, status_fd = fds
    os.setsid()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    status = socket.socket(fileno=status_fd)
    kills_before = _kernel_oom_kills()
    me = os.getpid()
    job = os.fork()
    if job == 0:
        status.close()
        wake.close()
        signal.set_wakeup_fd(-1)
        _run_job(request, me, payload_fd, result_fd, log_fd)
    signal.signal(signal.SIGTERM, lambda *_: status.shutdown(socket.SHUT_RD))
    for fd in (payload_fd, result_fd, log_fd):
        os.close(fd)
    status.sendall(b"started\n")
    cause = _watch(request, job, status, wake)
    if cause:
        with contextlib.suppress(ProcessLookupError):
            os.kill(job, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(job, 0)[1])
    _kill_tree()
    answer = {"cause": cause, "code": code, "kernel_oom": _kernel_oom_kills() > kills_before}
    with contextlib.suppress(OSError):
        status.sendall(json.dumps(answer).encode() + b"\n")


# --- the zygote ------------------------------------------------------------------------------------------------


def gpu_was_touched() -> bool:
    """Return whether this process has initialised CUDA's driver: then what it forks cannot use a GPU.

    A driver that nobody loaded is not. One that is loaded says so by itself: it refuses to count before `cuInit`.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    if "libcuda.so" not in maps:
        return False
    count = ctypes.c_int()
    return bool(ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(count)) == 0)


def _wake_pipe() -> IO[bytes]:
    """Return a stream that becomes readable when a child ends."""
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    return os.fdopen(read_fd, "rb", buffering=0)


def _fork_supervisor(control: socket.socket, wake: IO[bytes], fds: list[int]) -> int:
    with os.fdopen(fds[0], "rb") as stream:
        request = json.loads(stream.read())
    pid = os.fork()
    if pid:
        for fd in fds[1:]:
            os.close(fd)
        return pid
    code = 1
    try:
        control.close()
        wake.close()
        _supervise(request, fds, _wake_pipe())
        code = 0
    except BaseException:  # noqa: BLE001  nothing may return into the zygote's loop
        traceback.print_exc()
    finally:
        os._exit(code)


def _serve(control: socket.socket, parent: int) -> None:
    wake = _wake_pipe()
    supervisors: set[int] = set()
    while os.getppid() == parent:
        sources: list[Any] = [control, wake]
        readable, _, _ = select.select(sources, [], [], 1.0)
        if wake in readable:
            wake.read(4096)
        for pid in list(supervisors):
            if os.waitpid(pid, os.WNOHANG)[0]:
                supervisors.discard(pid)
        if control in readable:
            message, fds, _, _ = socket.recv_fds(control, 1, _DESCRIPTORS)
            if not message:
                break
            supervisors.add(_fork_supervisor(control, wake, fds))
    for pid in supervisors:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def main(arguments: list[str]) -> None:
    """Import the modules named, tell the parent, then fork jobs until the parent goes away."""
    control = socket.socket(fileno=int(arguments[0]))
    parent = int(arguments[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking whether there is a GPU must not initialise it
    began = time.monotonic()
    missing = {}
    for name in arguments[2:]:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001  a broken optional package must not end the search
            missing[name] = f"{type(error).__name__}: {error}"
        if gpu_was_touched():  # begin again without its package
            package = name.partition(".")[0]
            rest = [a for a in arguments if a.partition(".")[0] != package]
            sys.stderr.write(f"left out {package}: importing {name} initialises the GPU\n")
            sys.stderr.flush()
            os.set_inheritable(control.fileno(), True)  # noqa: FBT003
            os.execv(sys.executable, [sys.executable, "-m", "kernel_pytorch.measure.zygote", *rest])  # noqa: S606
    sys.stderr.write(f"imported {len(arguments) - 2} modules in {time.monotonic() - began:.1f} s\n")
    sys.stderr.flush()
    gc.collect()
    gc.freeze()  # jobs collect garbage: to look through all of torch again takes longer than small models
    control.sendall(json.dumps({"missing": missing}).encode() + b"\n")
    with contextlib.suppress(OSError):
        _serve(control, parent)
    gc.unfreeze()


if __name__ == "__main__":
    main(sys.argv[1:])
