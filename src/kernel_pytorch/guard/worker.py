"""The process of one side: loads a workload, and runs it when it is told to.

Run by its path, never imported by what it measures: the interpreter, the torch and the `kernel_pytorch` that it finds
are those of its side, which may be older than this file. So it imports the standard library alone until it is told to
load, and of the package only what has been there from the first release on; what is missing, it says.

It speaks JSON lines over two descriptors of its own, so that a model may print what it likes: `{"op": ...}` comes in,
`{"ok": ...}` or `{"error": ...}` goes out, in turn. It ends with whoever started it.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

__all__ = ["main"]

_SEED = 0
_COLD_MS = 10.0
"""A function shorter than this is called once, untimed, before it is timed: the other process had the caches.

In a longer one that is a small share, alike on both sides, and the time is better spent on more pairs: after 6 s, half
of an interval of training steps of 20 ms was 3.2 % without such calls, 5.1 % with them (`guard_turns.json`)."""
_TELEMETRY_S = 0.5
_LEAST_WATCHED_S = 1.0
"""The kernel counts CPU time in ticks of 10 ms: over less than this they tell nothing of other processes."""
_REST_S = 0.25
"""Longest wait for other threads of this process to come to rest; after `_RESTLESS` vain ones there are no more."""
_RESTLESS = 3
_POLL_REST_S = 0.0005
_TELLING = ("OMP_", "MKL_", "TORCH", "PYTORCH_", "CUDA_", "NVIDIA_", "NCCL_", "TRITON_", "KMP_")
"""Beginnings of the names of variables that decide what torch does; they are reported with the software."""
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSW", "CREDENTIAL", "AUTH")
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
_THREADS = Path("/proc/self/task")


class _RefusedError(Exception):
    """What was asked for cannot be done here; `kind` tells the other end which of its errors that is."""

    def __init__(self, kind: str, message: str, *, fix: str = "", trace: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.fix = fix
        self.trace = trace


def _import(name: str) -> Any:
    """Return a module of the package under test, or say what this environment lacks."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        top = (error.name or name).partition(".")[0]
        if top in ("torch", "kernel_pytorch"):
            if importlib.util.find_spec(top) is None:
                raise _RefusedError("missing", top) from error
            raise _RefusedError("old", f"its {top} has no {error.name}") from error
        raise _RefusedError("missing", error.name or name) from error


def _of(module: str, name: str) -> Any:
    """Return a function of the package under test."""
    found = getattr(_import(module), name, None)
    if found is None:
        raise _RefusedError("old", f"its {module} has no {name}()")
    return found


class _Loaded:
    """A workload on the device, and how one call (one step) of each of its cases is run."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        torch = _import("torch")
        self.training = request["mode"] == "training"
        self.manager = _of("kernel_pytorch.backends", "manager_for")()
        load_target = _of("kernel_pytorch.core.targets", "load_target")
        options = {"trust_remote_code": True} if request.get("trust_remote_code") else {}
        workload = load_target(request["target"], **options)
        torch.manual_seed(_SEED)
        model = self.manager.place(workload.model())
        model.train(self.training)
        self.weights: dict[str, float] = dict(workload.weights)
        self.calls = {case: self.manager.place(workload.call(case, _SEED)) for case in workload.cases}
        self.batches = {case: self.manager.place(workload.batch(case, _SEED)) for case in workload.cases}
        self.structure = [*_structure(model), *_inputs(torch, self.batches)]
        self.fingerprint = str(_of("kernel_pytorch.core.describe", "fingerprint")(model))
        optimizer = None
        if self.training:
            self.loss = _of("kernel_pytorch.core.describe", "training_loss")(workload)
            optimizer = _of("kernel_pytorch.core.describe", "make_optimizer")(workload, model.parameters())
        if request.get("plan"):
            model, optimizer = self._with_plan(request, model, optimizer)
        self.model, self.optimizer = model, optimizer
        self.steps = {case: self._step(torch, case) for case in self.weights}
        self.first_ms = {case: self.time_ms(case, 1) for case in self.steps}

    def _with_plan(self, request: Mapping[str, Any], model: Any, optimizer: Any) -> tuple[Any, Any]:
        options: dict[str, Any] = {"inputs": self.calls}
        if request.get("trust_artifacts"):
            options["trust_artifacts"] = True
        if self.training:
            prepared: tuple[Any, Any] = _of("kernel_pytorch.plan.apply", "prepare")(
                model, optimizer, plan=request["plan"], **options
            )
            return prepared
        return _of("kernel_pytorch.plan.apply", "apply")(request["plan"], model, **options), None

    def _step(self, torch: Any, case: str) -> Callable[[], Any]:
        model: Any = self.model
        optimizer: Any = self.optimizer
        if not self.training:
            call = self.calls[case]

            def infer() -> Any:
                with torch.no_grad():
                    return model(*call.args, **call.kwargs)

            return infer
        loss, batch = self.loss, self.batches[case]

        def train() -> Any:
            optimizer.zero_grad(set_to_none=True)
            value = loss(model, batch)
            value.backward()
            optimizer.step()
            return value

        return train

    def time_ms(self, case: str, calls: int) -> float:
        """Return milliseconds of one of so many calls in a row, from an idle device to an idle device."""
        step, result = self.steps[case], None
        self.manager.synchronize()
        start = time.perf_counter_ns()
        for _ in range(calls):
            result = step()
        self.manager.synchronize()
        spent = time.perf_counter_ns() - start
        del result
        return spent / 1e6 / calls


def _structure(model: Any) -> Iterator[str]:
    """Yield what makes two models the same function of their parameters' values, in lines that people can read."""
    first: dict[int, str] = {}
    for path, module in model.named_modules():
        yield f"module {path or '(root)'}: {type(module).__qualname__}"
        for kind, own in (("parameter", module._parameters), ("buffer", module._buffers)):  # noqa: SLF001
            for name, tensor in own.items():
                full = f"{path}.{name}" if path else name
                if tensor is None:
                    yield f"{kind} {full}: none"
                    continue
                tied = first.setdefault(id(tensor), full)
                shape = [*getattr(tensor, "shape", ())]
                yield f"{kind} {full}: {shape} {tensor.dtype}" + (f" is {tied}" if tied != full else "")


def _inputs(torch: Any, batches: Mapping[str, Any]) -> Iterator[str]:
    for case, batch in batches.items():
        tree = batch
        if hasattr(batch, "args") and hasattr(batch, "kwargs"):
            tree = (batch.args, dict(batch.kwargs))
        elif hasattr(batch, "keys"):
            tree = {key: batch[key] for key in batch.keys()}  # noqa: SIM118  a BatchEncoding
        leaves = torch.utils._pytree.tree_leaves(tree)  # noqa: SLF001
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        yield f"inputs of case {case}: " + ", ".join(f"{[*t.shape]} {t.dtype}" for t in tensors)


def _software(spec: Any, environment: Mapping[str, str]) -> dict[str, str]:
    """Return versions by name: the device's, those of every distribution that was imported, and telling variables."""
    from importlib import metadata

    torch: Any = importlib.import_module("torch")
    found = {**{k: str(v) for k, v in spec.software.items()}, "python": platform.python_version()}
    owners = metadata.packages_distributions()
    for top in {name.partition(".")[0] for name in list(sys.modules)}:
        for distribution in owners.get(top, ()):
            with suppress(metadata.PackageNotFoundError):
                told = metadata.distribution(distribution)
                if "_vendor" not in str(told.locate_file("")):  # setuptools shows its own while it is imported
                    found[distribution.lower()] = told.version
    found["torch"] = torch.__version__
    for name, version in (("cuda", torch.version.cuda), ("hip", torch.version.hip)):
        if version:
            found[name] = str(version)
    if torch.cuda.is_available() and torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    found["setting:threads"] = str(torch.get_num_threads())
    found["setting:float32_matmul_precision"] = str(torch.get_float32_matmul_precision())
    found["setting:deterministic"] = str(torch.are_deterministic_algorithms_enabled())
    if torch.cuda.is_available():
        found["setting:cudnn.benchmark"] = str(torch.backends.cudnn.benchmark)
    for name, value in environment.items():
        if name.startswith(_TELLING) and not any(word in name for word in _SECRET):
            found[f"env:{name}"] = value
    found.pop("kernel-pytorch", None)
    found["kernel_pytorch"] = str(importlib.import_module("kernel_pytorch").__version__)
    return dict(sorted(found.items()))


def _counts() -> dict[str, float]:
    """Return what torch has counted in this process: compiled frames, graph breaks, retries of the allocator."""
    found: dict[str, float] = {}
    torch: Any = sys.modules["torch"]
    dynamo = sys.modules.get("torch._dynamo.utils")
    counters: Any = getattr(dynamo, "counters", None)
    if counters is not None:
        found["recompilations"] = float(counters["frames"]["total"])
        found["graph_breaks"] = float(sum(counters["graph_break"].values()))
    if torch.cuda.is_initialized():
        found["allocator_retries"] = float(torch.cuda.memory_stats().get("num_alloc_retries", 0))
    return found


def _cpu_seconds() -> tuple[float, float]:
    """Return the CPU time of all processes and of this one, since the machine and this began."""
    psutil = importlib.import_module("psutil")
    total = psutil.cpu_times()
    return float(total.user + total.system + getattr(total, "nice", 0.0)), time.process_time()


def _others_run() -> bool:
    """Return whether another thread of this process runs, or waits for a core; where that cannot be seen, no."""
    own = str(threading.get_native_id())
    try:
        threads = [thread for thread in _THREADS.iterdir() if thread.name != own]
    except OSError:
        return False
    for thread in threads:
        with suppress(OSError):
            if (thread / "stat").read_bytes().rpartition(b")")[2].split(None, 1)[0] == b"R":
                return True
    return False


def _core() -> int | None:
    """Return the core that this thread runs on; `None` where the system does not tell."""
    try:
        core = int(_LIBC.sched_getcpu())
    except (AttributeError, OSError):
        return None
    return core if core >= 0 else None


def _move_to(core: int | None) -> None:
    """Let this thread go on on a core, from where the system may move it again: it is not bound to it."""
    if core is None or core == _core():
        return
    with suppress(AttributeError, OSError):
        allowed = os.sched_getaffinity(0)
        if core in allowed:
            os.sched_setaffinity(0, {core})
            os.sched_setaffinity(0, allowed)


def _let_go_of_the_lock() -> None:
    """From here on the driver holds the device's lock for this process: what waited for it here would wait for ever."""
    lock = _import("kernel_pytorch.backends.lock")
    lock.exclusive = lambda _: nullcontext()


def _strays(root: str) -> list[str]:
    """Return modules that came from a checkout that this side must not run; installed packages are none."""
    found = []
    checkout, installed = os.path.realpath(root) + os.sep, os.path.realpath(sys.prefix) + os.sep
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name in ("__main__", "__mp_main__") or not isinstance(file, str) or "site-packages" in file:
            continue
        real = os.path.realpath(file)
        if real.startswith(checkout) and not (installed.startswith(checkout) and real.startswith(installed)):
            found.append(f"{name} ({file})")
    return found


class _Session:
    """Answers requests, one at a time."""

    def __init__(self) -> None:
        self.loaded: _Loaded | None = None
        self._environment = dict(os.environ)  # before torch adds to it
        self._told_s = 0.0
        self._counted: dict[str, float] | None = None
        self._others_s = self._watched_s = 0.0
        self._restless = 0

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Do what a request asks for."""
        return getattr(self, "_on_" + str(request["op"]))(request)  # type: ignore[no-any-return]

    @property
    def _ready(self) -> _Loaded:
        assert self.loaded is not None
        return self.loaded

    def _on_import(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Import what loading takes most of its time for, while the other side does too; loading says what lacks."""
        for name in request["names"]:
            with suppress(Exception):
                importlib.import_module(name)
        return {}

    def _on_load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self.loaded = loaded = _Loaded(request)
        except ModuleNotFoundError as error:
            raise _RefusedError("missing", error.name or str(error)) from error
        strays = _strays(request["forbid"]) if request.get("forbid") else []
        if strays:
            raise _RefusedError("stray", ", ".join(strays[:3]))
        spec = loaded.manager.spec
        _let_go_of_the_lock()
        loaded.manager.telemetry()  # some values count from the call before
        return {
            "device_key": spec.key,
            "device": spec.name,
            "fingerprint": loaded.fingerprint,
            "structure": loaded.structure,
            "software": _software(spec, self._environment),
            "package": str(Path(str(importlib.import_module("kernel_pytorch").__file__)).parent),
            "first_ms": loaded.first_ms,
            "memory_total_bytes": getattr(spec, "memory_bytes", None),
        }

    def _on_call(self, _: Mapping[str, Any]) -> dict[str, Any]:
        """Time one call of every case: the warm-up."""
        gc.collect(1)
        told = {"ms": {case: self._ready.time_ms(case, 1) for case in self._ready.steps}}
        self._rest()
        return told

    def _rest(self) -> None:
        """Wait until no other thread of this process runs, so that none runs into the other side's turn.

        OpenMP's threads look for more work in a loop before they sleep: libgomp's for about 10 ms, Intel's for 200 ms.
        On two cores, that took a core from the other side's turn: pairs of training steps of 20 ms differed by 40 %
        (median absolute deviation), and by 6 % after a rest (`guard_turns.json`).
        """
        if self._restless >= _RESTLESS:
            return
        deadline = time.monotonic() + _REST_S
        while _others_run():
            if time.monotonic() > deadline:
                self._restless += 1
                return
            time.sleep(_POLL_REST_S)
        self._restless = 0

    def _on_sample(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Take one sample: the mean of so many calls of each case, weighted.

        It is taken on the core where the other side's last one was. Cores of one machine differ, by what runs beside
        them: pairs of 10 ms differed by 13 % with each side on whatever core, and by 5 % on one (`guard_turns.json`).
        """
        _move_to(request.get("core"))
        loaded, total = self._ready, 0.0
        if self._counted is None:
            self._counted = _counts()
        gc.collect(1)
        gc.disable()
        began, (busy, own) = time.monotonic(), _cpu_seconds()
        try:
            for case, calls in request["calls"].items():
                if request["ms"][case] < _COLD_MS:
                    loaded.steps[case]()
                total += loaded.weights[case] * loaded.time_ms(case, calls)
        finally:
            gc.enable()
        now = _cpu_seconds()
        self._others_s += now[0] - busy - (now[1] - own)
        self._watched_s += time.monotonic() - began
        core = _core()
        self._rest()
        return {"ms": total, "core": core, **self._telemetry()}

    def _on_versions(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Tell versions of distributions that the other side has imported and this one has not, where installed."""
        from importlib import metadata

        found = {}
        for name in request["names"]:
            with suppress(metadata.PackageNotFoundError):
                found[name] = metadata.version(name)
        return {"software": found}

    def _on_counts(self, _: Mapping[str, Any]) -> dict[str, Any]:
        """Tell what happened while it was sampled; graph breaks are made when it is compiled, and count from then."""
        before = {**(self._counted or {}), "graph_breaks": 0.0}
        found = {name: value - before.get(name, 0.0) for name, value in _counts().items()}
        if self._watched_s >= _LEAST_WATCHED_S:
            found["foreign_load_cores"] = max(0.0, self._others_s / self._watched_s)
        return {"counts": found}

    def _telemetry(self) -> dict[str, Any]:
        now = time.monotonic()
        if now - self._told_s < _TELEMETRY_S:
            return {}
        self._told_s = now
        return {"telemetry": dict(self._ready.manager.telemetry())}

    def _on_peak(self, _: Mapping[str, Any]) -> dict[str, Any]:
        loaded = self._ready
        steps = [loaded.manager.peak_bytes(step) for step in loaded.steps.values()]
        if any(step is None for step in steps):
            return {"peak_bytes": None}
        tensors = (*loaded.model.parameters(), *loaded.model.buffers())
        return {"peak_bytes": max(steps) + sum({t.data_ptr(): t.nbytes for t in tensors}.values())}

    def _on_profile(self, _: Mapping[str, Any]) -> dict[str, Any]:
        """Profile each case with the profiler beside this file: one for both sides, whatever their age."""
        guard = types.ModuleType("kernel_pytorch.guard")
        guard.__path__ = [str(Path(__file__).parent)]
        sys.modules[guard.__name__] = guard
        try:
            kernels_ms = importlib.import_module("kernel_pytorch.guard.profile").kernels_ms
        except ImportError as error:
            raise _RefusedError("old", str(error)) from error
        total: dict[str, float] = {}
        for case, step in self._ready.steps.items():
            for name, ms in kernels_ms(step, self._ready.manager).items():
                total[name] = total.get(name, 0.0) + self._ready.weights[case] * ms
        return {"kernels_ms": total}


def _error(error: BaseException) -> dict[str, Any]:
    """Return an exception as the other end reads it: `kind`, its class, what it says, how to mend it."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    told = {"class": type(error).__name__, "message": text, "fix": str(getattr(error, "fix", "")), "trace": ""}
    if isinstance(error, _RefusedError):
        return {**told, "kind": error.kind, "trace": error.trace}
    names = {kind.__name__ for kind in type(error).__mro__}
    if "KptError" in names:
        return {**told, "kind": "usage", "trace": str(getattr(error, "user_traceback", ""))}
    memory = names & {"MemoryError", "OutOfMemoryError"} or "can't allocate memory" in str(error)
    return {**told, "kind": "memory" if memory else "raised", "trace": traceback.format_exc()}


def _end_with(parent: int) -> None:
    """Let the kernel end this process with the one that started it, however that ends."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def main(arguments: list[str]) -> None:
    """Answer requests until there are no more: `worker.py READ_FD WRITE_FD PARENT_PID`."""
    reading, writing, parent = map(int, arguments)
    _end_with(parent)
    for descriptor in (reading, writing):
        os.set_inheritable(descriptor, False)  # noqa: FBT003  takes no keyword
    session = _Session()
    with os.fdopen(reading, "rb") as requests, os.fdopen(writing, "wb", buffering=0) as answers:
        answers.write(b'{"ok": {"python": "%s"}}\n' % platform.python_version().encode())
        for line in requests:
            request = json.loads(line)
            try:
                answer: dict[str, Any] = {"ok": session.answer(request)}
            except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001  a model may raise anything
                answer = {"error": _error(error)}
            sys.stdout.flush()
            sys.stderr.flush()
            answers.write(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
