"""The history as the rest of the package sees it: recording never costs a verdict, reading says what is wrong."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kernel_pytorch.guard.history.address import Address, read_address
from kernel_pytorch.guard.history.errors import HistoryError, MissingPackageError, RunError
from kernel_pytorch.guard.history.export import FORMATS
from kernel_pytorch.guard.history.spool import Spool
from kernel_pytorch.guard.types import Comparison

if TYPE_CHECKING:
    from kernel_pytorch.guard.history.database import Database

__all__ = ["History", "Receipt", "open_history"]

_SENDING_S = 20.0
"""What `record` spends at most on runs that others left: a long backlog must not hold up a verdict."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a run, or of those that waited.

    Attributes:
        stored: Whether the database holds the run; of a flush, whether nothing waits any more.
        sent: Runs that had waited and are in the database now.
        waiting: Runs that still wait on the local disk.
        message: One or more sentences for people; empty where all went well.
        fix: What the user can do about it.
    """

    stored: bool
    sent: int = 0
    waiting: int = 0
    message: str = ""
    fix: str = ""


def open_history(url: str | None = None, *, wait_s: float = 10.0) -> History | None:
    """Return the history that a URL or `KPT_HISTORY` names; `None` where it says `none`.

    Raises:
        HistoryError: The URL is not valid.
    """
    address = read_address(url)
    return None if address is None else History(address, wait_s=wait_s)


class History:
    """Every run of the guard, in SQLite or PostgreSQL. Nothing is opened before it is needed.

    Args:
        url: See `read_address`.
        wait_s: How long to wait for a connection, or for a lock that another process holds.

    Raises:
        HistoryError: The URL is not valid, or says `none`.

    Attributes:
        address: Where it is; `address.shown` has no secrets.
    """

    def __init__(self, url: str | Address | None = None, *, wait_s: float = 10.0) -> None:
        address = url if isinstance(url, Address) else read_address(url)
        if address is None:
            raise HistoryError("no history is kept", fix="unset KPT_HISTORY, or give --history a place")
        self.address = address
        self._wait_s = wait_s
        self._spool = Spool(address)
        self._database: Database | None = None

    def record(self, run: Comparison) -> Receipt:
        """Keep a run: first on the local disk, then in the database, then forget the local copy.

        So a kill, a server that is away, a lock or a full disk lose nothing, and the id keeps what is sent twice
        from being stored twice. A history that fails is told, never raised: the verdict matters more.
        """
        try:
            own, unsafe = self._spool.add(run), None
        except HistoryError as error:
            own, unsafe = None, error
        try:
            self._open().add(run)
        except HistoryError as problem:
            return self._unstored(own, unsafe, problem)
        if own is not None:
            self._spool.remove(own)
        rest = self._send(_SENDING_S)
        return Receipt(stored=True, sent=rest.sent, waiting=rest.waiting, message=rest.message, fix=rest.fix)

    def flush(self, *, max_seconds: float = 600.0) -> Receipt:
        """Send what waits on the local disk; what cannot be sent stays there."""
        if not self._spool.files():
            return Receipt(stored=True)
        try:
            self._open()
        except HistoryError as error:
            waiting = len(self._spool.files())
            return Receipt(stored=False, waiting=waiting, message=str(error), fix=error.fix)
        return self._send(max_seconds)

    def waiting(self) -> list[Path]:
        """Return the local files of runs that the database does not hold yet."""
        return self._spool.files()

    def runs(
        self, name: str | None = None, since: datetime | str | None = None, limit: int | None = None
    ) -> list[Comparison]:
        """Return runs, oldest first.

        Args:
            name: Only these.
            since: Only those made at this moment or later; ISO 8601, UTC where it has no zone.
            limit: At most so many, the newest.

        Raises:
            HistoryError: The history cannot be read.
        """
        if limit is not None and limit < 1:
            raise HistoryError(f"limit is {limit}, expected 1 or more")
        moment = _moment(since)
        return self._open_for_reading().runs(name=name, since=moment, limit=limit)

    def run(self, run_id: str) -> Comparison:
        """Return the run with an id, or with the only id that starts so.

        Raises:
            HistoryError: There is none, or more than one, or the history cannot be read.
        """
        found = self._open_for_reading().starting_with(run_id) if run_id else []
        if not found:
            raise HistoryError(f"no run {run_id!r} in {self.address.shown}", fix="kpt history list")
        if len(found) > 1:
            raise HistoryError(f"more than one run starts with {run_id!r}", fix="give more of its id")
        return found[0]

    def names(self) -> list[str]:
        """Return the names of what was compared, sorted.

        Raises:
            HistoryError: The history cannot be read.
        """
        return self._open_for_reading().names()

    def prune(self, *, keep_days: float | None = None, keep_runs: int | None = None) -> int:
        """Delete old runs and return how many.

        Args:
            keep_days: Keep what is not older than this.
            keep_runs: Keep the newest of each name. With both, what either keeps stays.

        Raises:
            HistoryError: Neither is given or one is negative, or the history cannot be written.
        """
        if keep_days is None and keep_runs is None:
            raise HistoryError("nothing says which runs to keep", fix="give --keep-days, --keep-runs or both")
        for name, value in (("keep_days", keep_days), ("keep_runs", keep_runs)):
            if value is not None and not 0 <= value <= 1e6:
                raise HistoryError(f"{name} is {value}, expected 0 to 1000000")
        return self._open_for_reading().prune(keep_days=keep_days, keep_runs=keep_runs)

    def export(
        self,
        format: Literal["json", "csv"],
        *,
        name: str | None = None,
        since: datetime | str | None = None,
    ) -> str:
        """Return runs as text: `json` with all samples, `csv` with one line a run.

        Raises:
            HistoryError: The format is another, or the history cannot be read.
        """
        if format not in FORMATS:
            raise HistoryError(f"unknown format {format!r}", fix=f"one of {', '.join(FORMATS)}")
        return FORMATS[format](self.runs(name, since))

    def _open(self) -> Database:
        if self._database is None:
            try:
                from kernel_pytorch.guard.history.database import Database
            except ModuleNotFoundError as error:
                raise MissingPackageError(
                    f"{self.address.shown} needs the package {error.name}, which is not installed",
                    fix="pip install 'kernel-pytorch[history]'; runs are kept locally and sent later",
                ) from error
            self._database = Database(self.address, wait_s=self._wait_s)
        return self._database

    def _open_for_reading(self) -> Database:
        """Open, and take in what waits, so that readers see every run.

        A user who may only read sees what is stored: what waits is told by `waiting()`.
        """
        try:
            database = self._open()
        except HistoryError as error:
            waiting = len(self._spool.files())
            if not waiting:
                raise
            raise type(error)(f"{error}; {waiting} runs wait in {self._where()}", fix=error.fix) from error
        if self._spool.files():
            self._send(_SENDING_S)
        return database

    def _unstored(self, own: Path | None, unsafe: HistoryError | None, problem: HistoryError) -> Receipt:
        waiting = len(self._spool.files())
        if own is None:
            message = f"this run is NOT in the history: {problem}; {unsafe}"
            return Receipt(stored=False, waiting=waiting, message=message, fix=unsafe.fix if unsafe else problem.fix)
        later = "not taken" if isinstance(problem, RunError) else "sent later"
        message = f"this run is kept in {own} and {later}: {problem}"
        return Receipt(stored=False, waiting=waiting, message=message, fix=problem.fix)

    def _send(self, max_seconds: float) -> Receipt:
        """Send what waits, unless another process does so already."""
        paths = self._spool.files()
        if not paths:
            return Receipt(stored=True)
        sent, problems, fix = 0, [], ""
        deadline = time.monotonic() + max_seconds
        with self._spool.only_sender() as alone:
            for path in paths if alone else ():
                if time.monotonic() > deadline:
                    break
                try:
                    run = self._spool.read(path)
                except RunError as error:
                    problems.append(str(error))
                    continue
                if run is None:
                    continue
                try:
                    self._open().add(run)
                    self._spool.remove(path)
                    sent += 1
                except RunError as error:
                    problems.append(f"{error}; it stays in {path}")
                    fix = fix or f"rm {path} gives it up"
                except HistoryError as error:
                    problems.append(str(error))
                    fix = error.fix
                    break
        waiting = len(self._spool.files())
        return Receipt(stored=not waiting, sent=sent, waiting=waiting, message="; ".join(problems), fix=fix)

    def _where(self) -> str:
        return ", ".join(sorted({str(path.parent) for path in self._spool.files()}))


def _moment(value: datetime | str | None) -> datetime | None:
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError as error:
        raise HistoryError(
            f"{value!r} is not a date", fix="ISO 8601: 2026-11-22, or 2026-11-22T18:00:00+01:00"
        ) from error
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
