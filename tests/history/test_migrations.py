"""Tables come to be, and to change, by themselves."""

from __future__ import annotations

import sqlite3

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from kernel_pytorch.guard.history import History, HistoryError, database
from kernel_pytorch.guard.history.models import HEAD, VERSION_TABLE, Tables
from tests.history.made import make_run


def connect(url):
    history = History(url)
    history.names()
    return history._open()._engine.connect()


def test_the_newest_migration_is_the_one_the_code_knows():
    config = Config()
    config.set_main_option("script_location", str(database._MIGRATIONS))
    config.set_main_option("path_separator", "os")
    scripts = ScriptDirectory.from_config(config)
    assert scripts.get_heads() == [HEAD]
    assert all(script.revision <= HEAD for script in scripts.walk_revisions()), "older versions must sort before newer"


def test_migrations_make_the_tables_of_the_models(url):
    with connect(url) as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "compare_type": True})
        assert compare_metadata(context, Tables.metadata) == []


def test_opening_again_migrates_nothing(url, monkeypatch):
    History(url).record(make_run())
    monkeypatch.setattr(database.Database, "_migrate", None)
    assert History(url).runs() == [make_run()]


def test_a_history_of_a_newer_version_is_left_alone(url):
    with connect(url) as connection, connection.begin():
        connection.execute(sa.text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(HistoryError, match="9999") as caught:
        History(url).runs()
    assert "upgrade" in caught.value.fix
    history = History(url)
    receipt = history.record(make_run())
    assert (receipt.stored, receipt.waiting) == (False, 1)
    assert "9999" in receipt.message


def test_a_history_of_an_unknown_version_is_left_alone(url):
    with connect(url) as connection, connection.begin():
        connection.execute(sa.text(f"UPDATE {VERSION_TABLE} SET version_num = '0000'"))
    with pytest.raises(HistoryError, match="0000"):
        History(url).runs()


def test_other_applications_tables_and_migrations_are_left_alone(url):
    history = History(url)
    if history.address.path is not None:
        engine = sa.create_engine(f"sqlite:///{history.address.path}", poolclass=sa.NullPool)
    else:
        engine = sa.create_engine(history.address.url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE alembic_version (version_num VARCHAR(32))"))
        connection.execute(sa.text("INSERT INTO alembic_version VALUES ('theirs')"))
        connection.execute(sa.text("CREATE TABLE runs (id INTEGER)"))
    assert history.record(make_run()).stored
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT version_num FROM alembic_version")) == "theirs"


def test_a_migration_that_fails_leaves_nothing_half_done(url):
    with connect(url) as connection, connection.begin():
        connection.execute(sa.text(f"DROP TABLE {VERSION_TABLE}"))
        connection.execute(sa.text("DROP INDEX ix_kpt_runs_created"))
        connection.execute(sa.text("ALTER TABLE kpt_runs RENAME TO kept"))
        connection.execute(sa.text("CREATE INDEX ix_kpt_runs_created ON kept (name)"))
    history = History(url)
    with pytest.raises(HistoryError, match="already exists"):
        history.names()
    engine = sa.create_engine(history.address.url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        assert set(sa.inspect(connection).get_table_names()) == {"kept"}


def test_sqlite_keeps_readers_and_writers_apart(tmp_path):
    path = tmp_path / "h.sqlite"
    History(str(path)).record(make_run())
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA auto_vacuum").fetchone() == (2,)
    connection.close()
