"""The directory of a search: one writer, a journal that survives kills, a plan never half written."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.types import DeviceSpec, Plan, Trial, WorkloadSpec
from kernel_pytorch.errors import OutputDirectoryError, PlanError
from kernel_pytorch.plan import schema

__all__ = ["SearchDirectory", "load_plan", "write_text"]

JOURNAL_VERSION = 1


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part.

    Raises:
        OutputDirectoryError: It cannot be written.
    """
    temporary = ""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def load_plan(path: str | Path) -> Plan:
    """Read a plan from a file, or from `plan.json` in a directory.

    Raises:
        PlanError: There is none, or it is corrupted or of a newer schema.
    """
    file = Path(path)
    if file.is_dir():
        file /= "plan.json"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise PlanError(f"no plan at {file}", fix="kpt optimize TARGET -o DIR") from error
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{file} cannot be read: {error}") from error
    return schema.loads(text, what=str(file))


def _unwritable(path: Path, error: OSError) -> OutputDirectoryError:
    return OutputDirectoryError(
        f"cannot write {path}: {error.strerror or error}", fix="choose another directory with -o DIR"
    )


class SearchDirectory:
    """The output directory of a search; use it as a context manager, which holds its lock.

    Files: `plan.json` (the outcome: data), `trials.jsonl` (the journal of a running or interrupted search),
    `artifacts/` (code: packages, compile caches; loads only where the user trusts it), `.lock`.

    Attributes:
        path: The directory, absolute.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().resolve()
        self._lock: IO[str] | None = None
        self._journal: IO[bytes] | None = None

    @property
    def plan_path(self) -> Path:
        """Where the plan is written."""
        return self.path / "plan.json"

    @property
    def artifacts(self) -> Path:
        """The directory for files that are code."""
        return self.path / "artifacts"

    def __enter__(self) -> Self:
        """Create the directory where needed and take its lock.

        Raises:
            OutputDirectoryError: It cannot be written, or another search holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise _unwritable(self.path, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise OutputDirectoryError(
                f"another search (pid {holder}) is writing {self.path}",
                fix="wait for it, stop it, or choose another directory with -o DIR",
            ) from error
        except OSError as error:
            lock.close()
            raise _unwritable(self.path, error) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the journal and release the lock."""
        for file in (self._journal, self._lock):
            if file is not None:
                file.close()
        self._journal = self._lock = None

    def begin(
        self, workload: WorkloadSpec, device: DeviceSpec, config: KernelPyTorchConfig, *, resume: bool = False
    ) -> tuple[Trial, ...]:
        """Open the journal and return the trials that an interrupted search of the same thing finished.

        Args:
            workload: What is searched for; old trials count only for the same fingerprint and input signatures.
            device: Where; the same hardware and software.
            config: How; everything but the budget must be the same (a longer budget is what resuming is for).
            resume: Whether to continue; else a new journal begins and `trials.previous.jsonl` keeps the old.

        Raises:
            OutputDirectoryError: The journal is of another search, is corrupted, or cannot be written.
        """
        assert self._lock is not None, "enter the directory first"
        path = self.path / "trials.jsonl"
        header = _identity(workload, device, config)
        try:
            if resume and path.exists():
                trials, good_bytes = self._replay(path, header)
                os.truncate(path, good_bytes)
                self._journal = path.open("ab")
                if not good_bytes:
                    self._write_line(json.dumps(header, allow_nan=False))
                return trials
            if path.exists():
                path.replace(path.with_name("trials.previous.jsonl"))
            self._journal = path.open("ab")
            self._write_line(json.dumps(header, allow_nan=False))
        except OSError as error:
            raise _unwritable(path, error) from error
        return ()

    def _replay(self, path: Path, header: Mapping[str, Any]) -> tuple[tuple[Trial, ...], int]:
        whole = path.read_bytes()
        complete = whole[: whole.rfind(b"\n") + 1]  # what follows was cut off by a kill in mid-write
        lines = complete.decode("utf-8", errors="replace").splitlines()
        if not lines:
            return (), 0
        try:
            found = json.loads(lines[0])
        except json.JSONDecodeError:
            found = None
        if not isinstance(found, dict):
            raise OutputDirectoryError(f"{path} is not a journal of a search", fix="run without --resume")
        differing = sorted(k for k in {*found, *header} if found.get(k) != header.get(k))
        if differing:
            raise OutputDirectoryError(
                f"{path} is of another search: {_difference(differing[0], found, header)}",
                fix="run without --resume, or choose another directory with -o DIR",
            )
        try:
            trials = tuple(
                schema.trial_loads(line, what=f"{path} line {number}") for number, line in enumerate(lines[1:], start=2)
            )
        except PlanError as error:
            raise OutputDirectoryError(str(error), fix="run without --resume") from error
        return trials, len(complete)

    def append(self, trial: Trial) -> None:
        """Journal a finished trial; it survives a kill of this process once this returns.

        Raises:
            OutputDirectoryError: The journal cannot be written.
        """
        try:
            self._write_line(schema.trial_dumps(trial))
        except OSError as error:
            raise _unwritable(self.path / "trials.jsonl", error) from error

    def _write_line(self, line: str) -> None:
        assert self._journal is not None, "begin() first"
        self._journal.write(line.encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def write_plan(self, plan: Plan) -> Path:
        """Write `plan.json` and return its path.

        Raises:
            OutputDirectoryError: It cannot be written.
        """
        write_text(self.plan_path, schema.dumps(plan))
        return self.plan_path

    def make_artifacts(self) -> Path:
        """Create and return the directory for files that are code.

        Raises:
            OutputDirectoryError: It cannot be created.
        """
        try:
            self.artifacts.mkdir(exist_ok=True)
        except OSError as error:
            raise _unwritable(self.artifacts, error) from error
        return self.artifacts


def _identity(workload: WorkloadSpec, device: DeviceSpec, config: KernelPyTorchConfig) -> dict[str, Any]:
    asked = {k: v for k, v in config.as_json().items() if k != "budget_s"}
    header: dict[str, Any] = schema.plain(
        {
            "journal_version": JOURNAL_VERSION,
            "model": workload.fingerprint,
            "inputs": workload.signatures,
            "weights": workload.weights,
            "device": device.key,
            "software": device.software,
            "config": asked,
        }
    )
    return header


def _difference(key: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    old, new = found.get(key), wanted.get(key)
    if isinstance(old, dict) and isinstance(new, dict):
        with contextlib.suppress(StopIteration):
            inner = next(k for k in sorted({*old, *new}) if old.get(k) != new.get(k))
            return f"{key}.{inner} was {old.get(inner)!r}, is now {new.get(inner)!r}"
    return f"{key} was {old!r}, is now {new!r}"
