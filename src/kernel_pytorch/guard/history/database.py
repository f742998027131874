"""The database of a history: opened, migrated, written and read. The only module here that needs SQLAlchemy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.dialects import postgresql, sqlite

from kernel_pytorch.guard.history import codec
from kernel_pytorch.guard.history.address import Address
from kernel_pytorch.guard.history.errors import HistoryError, MissingPackageError, RunError
from kernel_pytorch.guard.history.models import HEAD, VERSION_TABLE, Run
from kernel_pytorch.guard.types import Comparison

__all__ = ["Database", "read_moment"]

_MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK = 0x6B70_7468_6973_7401
"""Key of the advisory lock under which one process migrates a PostgreSQL database."""


class Database:
    """An open history. Each call takes a connection of its own, so that a server may restart between two calls.

    Args:
        address: Where it is; a SQLite file and its directory are created where they are missing.
        wait_s: How long to wait for a connection or a lock that another process holds.

    Raises:
        HistoryError: It cannot be opened, or a newer kernel_pytorch made it.
    """

    def __init__(self, address: Address, *, wait_s: float) -> None:
        self._address = address
        self._wait_s = wait_s
        with self._explained():
            if address.path is not None:
                address.path.parent.mkdir(parents=True, exist_ok=True)
            self._engine = self._create_engine()
            with self._engine.connect() as connection:
                version = _read_version(connection)
            if version != HEAD:
                self._migrate()

    def add(self, run: Comparison) -> None:
        """Store a run; one that is stored already stays as it is.

        Raises:
            RunError: The database takes others, but not this one.
            HistoryError: The database takes none now.
        """
        row = _row(run)
        with self._explained(run.id), self._writing() as connection:
            insert = sqlite.insert if self._address.path is not None else postgresql.insert
            connection.execute(insert(Run).values(row).on_conflict_do_nothing(index_elements=[Run.id]))

    def runs(
        self, *, name: str | None = None, since: datetime | None = None, limit: int | None = None
    ) -> list[Comparison]:
        """Return runs, oldest first; of more than `limit` the newest."""
        query = sa.select(Run.id, Run.document).order_by(Run.created.desc(), Run.stored.desc(), Run.id)
        if name is not None:
            query = query.where(Run.name == _clean(name))
        if since is not None:
            query = query.where(Run.created >= since)
        if limit is not None:
            query = query.limit(limit)
        with self._explained(), self._engine.connect() as connection:
            rows = connection.execute(query).all()
        return [codec.from_plain(document, what=f"run {key} of the history") for key, document in reversed(rows)]

    def starting_with(self, prefix: str) -> list[Comparison]:
        """Return the run with an id, else the first two whose id starts with it."""
        prefix = _clean(prefix)
        query = sa.select(Run.id, Run.document).where(Run.id.startswith(prefix, autoescape=True)).order_by(Run.id)
        with self._explained(), self._engine.connect() as connection:
            rows = connection.execute(query.limit(2)).all()
        exact = [row for row in rows if row[0] == prefix]
        return [codec.from_plain(document, what=f"run {key} of the history") for key, document in exact or rows]

    def names(self) -> list[str]:
        """Return what was compared, by name."""
        with self._explained(), self._engine.connect() as connection:
            return list(connection.scalars(sa.select(Run.name).distinct().order_by(Run.name)))

    def prune(self, *, keep_days: float | None, keep_runs: int | None) -> int:
        """Delete runs that no rule keeps; return how many."""
        kept: sa.ColumnElement[bool] = sa.false()
        if keep_days is not None:
            kept = sa.or_(kept, Run.created >= datetime.now(UTC) - timedelta(days=keep_days))
        if keep_runs is not None:
            rank = sa.func.row_number().over(
                partition_by=Run.name, order_by=(Run.created.desc(), Run.stored.desc(), Run.id)
            )
            ranked = sa.select(Run.id, rank.label("rank")).subquery()
            kept = sa.or_(kept, Run.id.in_(sa.select(ranked.c.id).where(ranked.c.rank <= keep_runs)))
        with self._explained():
            with self._writing() as connection:
                deleted = connection.execute(sa.delete(Run).where(sa.not_(kept))).rowcount
            if deleted and self._address.path is not None:
                self._shrink()
        return deleted

    def _shrink(self) -> None:
        """Give the pages of deleted rows back to the file system; PostgreSQL's autovacuum does so by itself."""
        with closing(self._engine.raw_connection()) as connection:
            # `execute` would take the first step only, which frees one page.
            connection.cursor().executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE)")

    def _create_engine(self) -> sa.Engine:
        if self._address.path is not None:
            return self._create_sqlite(self._address.path)
        url = sa.make_url(self._address.url)
        patience = str(max(2, math.ceil(self._wait_s)))
        wanted = {
            "connect_timeout": patience,
            "application_name": "kernel_pytorch",
            "keepalives_idle": patience,
            "keepalives_interval": patience,
            "keepalives_count": "3",
            "tcp_user_timeout": str(1000 * int(patience)),
        }
        arguments: dict[str, Any] = {k: v for k, v in wanted.items() if k not in url.query}
        # Prepared statements would not survive a pooler that gives each transaction another server connection.
        arguments["prepare_threshold"] = None
        engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args=arguments, hide_parameters=True)
        milliseconds = round(self._wait_s * 1000)

        @event.listens_for(engine, "begin")
        def limit_waits(connection: sa.Connection) -> None:
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = {milliseconds}")

        return engine

    def _create_sqlite(self, path: Path) -> sa.Engine:
        url = sa.URL.create("sqlite", database=str(path))
        arguments = {"timeout": self._wait_s}
        engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args=arguments, hide_parameters=True)

        @event.listens_for(engine, "connect")
        def prepare(connection: Any, _: object) -> None:
            # The driver must not begin transactions by itself: it would begin them without the write lock.
            connection.isolation_level = None
            connection.execute("PRAGMA synchronous = FULL")
            if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
                connection.execute("PRAGMA journal_mode = WAL")

        @event.listens_for(engine, "begin")
        def begin(connection: sa.Connection) -> None:
            writes = connection.get_execution_options().get("kpt_writes", False)
            # A transaction that reads first and writes later cannot wait for the lock: SQLite refuses it at once.
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

        return engine

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        with self._engine.connect().execution_options(kpt_writes=True) as connection, connection.begin():
            yield connection

    def _migrate(self) -> None:
        with self._writing() as connection:
            if self._address.path is None:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
            # Another process may have migrated while this one waited for the lock.
            version = _read_version(connection)
            if version == HEAD:
                return
            if version is not None and version > HEAD:
                raise HistoryError(
                    f"{self._address.shown} has schema {version}, this kernel_pytorch knows up to {HEAD}",
                    fix="pip install --upgrade kernel-pytorch",
                )
            from alembic import command
            from alembic.config import Config
            from alembic.util import CommandError

            config = Config(attributes={"connection": connection})
            config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
            config.set_main_option("path_separator", "os")
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise HistoryError(
                    f"{self._address.shown} has a schema that cannot be migrated: {error}",
                    fix="give another place with --history or KPT_HISTORY",
                ) from error

    @contextmanager
    def _explained(self, run_id: str = "") -> Iterator[None]:
        """Turn what the database says into an error that says what to do."""
        try:
            yield
        except ImportError as error:
            raise MissingPackageError(
                f"{self._address.shown} needs a package: {error}", fix="pip install 'kernel-pytorch[history]'"
            ) from error
        except OSError as error:
            raise HistoryError(
                f"{self._address.shown} cannot be opened: {error}", fix=_fix(self._address, "")
            ) from error
        except exc.SQLAlchemyError as error:
            message = self._without_secrets(str(getattr(error, "orig", None) or error))
            if run_id and isinstance(error, exc.DataError | exc.IntegrityError):
                raise RunError(f"{self._address.shown} refuses run {run_id}: {message}") from None
            # No chain: the original error may quote the URL with its password.
            raise HistoryError(
                f"{self._address.shown} is not usable now: {message}", fix=_fix(self._address, message)
            ) from None

    def _without_secrets(self, message: str) -> str:
        first = " ".join(line.strip() for line in message.splitlines() if line.strip())
        password = urlsplit(self._address.url).password if self._address.path is None else None
        for secret in {password, unquote(password)} if password else ():
            first = first.replace(secret, "***")
        return first[:500]


def read_moment(text: str) -> datetime:
    """Return the moment of an ISO 8601 text; one without a zone is UTC.

    Raises:
        ValueError: It is none.
    """
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _read_version(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    version: str | None = connection.scalar(sa.text(f"SELECT version_num FROM {VERSION_TABLE}"))  # noqa: S608  a constant
    return version


def _row(run: Comparison) -> dict[str, Any]:
    try:
        created = read_moment(run.created)
    except ValueError as error:
        raise RunError(f"run {run.id} was created at {run.created!r}, which is no ISO 8601 time") from error
    change = run.change
    return {
        "id": _clean(run.id),
        "created": created,
        "stored": datetime.now(UTC),
        "kind": _clean(run.kind),
        "name": _clean(run.name),
        "verdict": str(run.verdict),
        "reason": _clean(run.reason),
        "change": _finite(change.value) if change else None,
        "change_low": _finite(change.low) if change else None,
        "change_high": _finite(change.high) if change else None,
        "base_ms": _finite(statistics.median(run.base_samples_ms)) if run.base_samples_ms else None,
        "head_ms": _finite(statistics.median(run.head_samples_ms)) if run.head_samples_ms else None,
        "base_revision": _clean(run.base.revision),
        "head_revision": _clean(run.head.revision),
        "device": _clean(run.head.device_key or run.base.device_key),
        "document": codec.to_plain(run),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _clean(text: str) -> str:
    """Return a text that every database takes: PostgreSQL has no NUL, UTF-8 no lone surrogates."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")


def _fix(address: Address, message: str) -> str:
    if address.path is None:
        return "see that the server runs and takes this user; runs are kept locally and sent later"
    path = address.path
    if "not a database" in message or "malformed" in message:
        return (
            f"mv {path} {path}.damaged; the next run begins a new history, and "
            f"`sqlite3 {path}.damaged .recover` may give old runs back"
        )
    if "locked" in message:
        return f"see which process holds {path} (fuser {path}); runs are kept locally and sent later"
    if "full" in message or "disk I/O" in message or "No space" in message:
        return f"free some space where {path.parent} lies; runs are kept locally where that is possible"
    return f"see that {path} can be written, or give another place with --history or KPT_HISTORY"
