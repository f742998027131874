"""The tables of a history, for SQLite and PostgreSQL. Every change here needs a migration beside it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, DateTime, Double, Index, MetaData, String, Text
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

__all__ = ["HEAD", "VERSION_TABLE", "Run", "Tables"]

HEAD = "0001"
"""The newest migration; a test holds it to `migrations/versions`."""
VERSION_TABLE = "kpt_schema_version"
"""Not Alembic's default name, so that the history can live in a database that another application migrates."""


class Instant(TypeDecorator[datetime]):
    """A moment, always with its time zone; SQLite, which knows none, holds UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Return the moment in UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Return the moment with its zone."""
        if value is None or value.tzinfo is not None:
            return value
        return value.replace(tzinfo=UTC)


class Tables(DeclarativeBase):
    """The registry of the history's tables."""

    metadata = MetaData(naming_convention={"ix": "ix_%(table_name)s_%(column_0_N_name)s", "pk": "pk_%(table_name)s"})


class Run(Tables):
    """One `Comparison`. The columns beside `document` are copies for queries and dashboards.

    Attributes:
        document: The whole run as JSON, samples included.
        change: Head time over base time, with `change_low` and `change_high` its interval; 1.03 is 3 % slower.
        base_ms: Median of the old side; `head_ms` of the new one.
        stored: When the database took it.
    """

    __tablename__ = "kpt_runs"
    __table_args__ = (Index(None, "name", "created"), Index(None, "created"))

    id: Mapped[str] = mapped_column(String, primary_key=True)
    created: Mapped[datetime] = mapped_column(Instant)
    stored: Mapped[datetime] = mapped_column(Instant)
    kind: Mapped[str] = mapped_column(String)
    name: Mapped[str] = mapped_column(String)
    verdict: Mapped[str] = mapped_column(String)
    reason: Mapped[str] = mapped_column(Text)
    change: Mapped[float | None] = mapped_column(Double)
    change_low: Mapped[float | None] = mapped_column(Double)
    change_high: Mapped[float | None] = mapped_column(Double)
    base_ms: Mapped[float | None] = mapped_column(Double)
    head_ms: Mapped[float | None] = mapped_column(Double)
    base_revision: Mapped[str] = mapped_column(String)
    head_revision: Mapped[str] = mapped_column(String)
    device: Mapped[str] = mapped_column(String)
    document: Mapped[dict[str, Any]] = mapped_column(JSON)
