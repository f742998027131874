"""Runs that wait on the local disk until their database takes them: one JSON file a run, never half written."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from kernel_pytorch.errors import KptError
from kernel_pytorch.guard.history import codec
from kernel_pytorch.guard.history.address import Address, find_state_directory
from kernel_pytorch.guard.history.errors import HistoryError, RunError
from kernel_pytorch.guard.types import Comparison
from kernel_pytorch.plan.store import write_text

__all__ = ["Spool"]


class Spool:
    """The waiting runs of one history.

    The first place is the user's state directory. Where that takes nothing (full, read-only) the directory for
    temporary files is the second, so that a full home does not cost a run.

    Attributes:
        places: Directories in the order in which they are tried; they may not exist yet.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        # Not tempfile.gettempdir(): it raises where every disk is full, and may answer with the working directory.
        parents = [Path(os.environ.get("TMPDIR") or "/tmp") / f"kernel_pytorch-spool-{os.getuid()}"]  # noqa: S108
        with contextlib.suppress(HistoryError):
            parents.insert(0, find_state_directory() / "spool")
        self.places = tuple(parent / address.key for parent in parents)

    def add(self, run: Comparison) -> Path:
        """Write a run and return its file; it survives a kill or a power cut once this returns.

        Raises:
            HistoryError: No place takes it; the message names each and why.
        """
        text = json.dumps({"history": self._address.shown, "run": codec.to_plain(run)}, allow_nan=False) + "\n"
        failures = []
        for place in self.places:
            try:
                _make_private(place)
                path = place / _file_name(run)
                write_text(path, text)
                _sync(place)
            except (OSError, KptError) as error:
                failures.append(f"{place}: {_reason(error)}")
                continue
            return path
        raise HistoryError(
            f"no local disk takes the run ({'; '.join(failures)})",
            fix="free some space, or set XDG_STATE_HOME or TMPDIR to a directory that can be written",
        )

    def files(self) -> list[Path]:
        """Return the waiting files, oldest run first."""
        found: list[Path] = []
        for place in self.places:
            if _is_own(place.parent) and _is_own(place):
                found += place.glob("[!.]*.json")
        return sorted(found, key=lambda path: path.name)

    def read(self, path: Path) -> Comparison | None:
        """Return a waiting run; `None` where another process has sent it meanwhile.

        Raises:
            RunError: The file is damaged; it was renamed to `*.damaged`, so that it does not stand in the way again.
        """
        try:
            text = path.read_text("utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise self._set_aside(path, str(error)) from error
        try:
            values = json.loads(text)
            return codec.from_plain(values["run"], what=str(path))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._set_aside(path, str(error)) from error

    def _set_aside(self, path: Path, reason: str) -> RunError:
        aside = path.with_suffix(".damaged")
        try:
            path.replace(aside)
        except OSError as error:
            return RunError(f"{path} cannot be read ({reason}) nor renamed ({error.strerror})")
        return RunError(f"a waiting run was damaged ({reason}); it is kept as {aside}")

    def remove(self, path: Path) -> None:
        """Forget a run that its database holds. A file that cannot be removed is sent again, which changes nothing."""
        with contextlib.suppress(OSError):
            path.unlink()

    @contextlib.contextmanager
    def only_sender(self) -> Iterator[bool]:
        """Hold the right to send what others left; gives False where another process has it, or no lock can be had."""
        try:
            _make_private(self.places[0])
            lock = (self.places[0] / ".lock").open("a")
        except (OSError, HistoryError):
            yield False
            return
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                held = False
            else:
                held = True
            yield held


def _file_name(run: Comparison) -> str:
    """Return a name that sorts by time, is legal whatever the id holds, and is the same for the same run."""
    when = re.sub(r"[^0-9TZ]", "", run.created)[:24]
    return f"{when or 'undated'}-{hashlib.sha256(run.id.encode('utf-8', 'surrogatepass')).hexdigest()[:24]}.json"


def _make_private(place: Path) -> None:
    """Create a directory that only this user can enter, and refuse one that somebody else prepared."""
    for directory in (place.parent, place):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_own(directory):
            raise HistoryError(f"{directory} belongs to somebody else")


def _is_own(directory: Path) -> bool:
    try:
        found = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    return (cause.strerror if isinstance(cause, OSError) else None) or str(error)
