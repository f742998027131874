"""Histories in every database, each test with a state directory and a database of its own."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("sqlalchemy", reason="pip install 'kernel-pytorch[history]'")

from tests.history import server as pg

NUMBERS = itertools.count(1)


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    """The directories that a user's runs go to, empty."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.delenv("KPT_HISTORY", raising=False)
    return tmp_path / "state" / "kernel_pytorch"


@pytest.fixture(scope="session")
def cluster():
    reason = pg.why_not()
    if reason:
        pytest.skip(reason)
    pytest.importorskip("psycopg", reason="pip install 'kernel-pytorch[history]'")
    started = pg.Server()
    yield started
    started.remove()


@pytest.fixture
def server(cluster):
    """The server, running; a test may kill it."""
    yield cluster
    if not cluster.running():
        cluster.start()


@pytest.fixture
def postgresql(server):
    """The URL of an empty database."""
    name = f"history_{next(NUMBERS)}"
    server.sql(f"CREATE DATABASE {name}")
    return server.url(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    return str(tmp_path / "history.sqlite") if request.param == "sqlite" else request.getfixturevalue("postgresql")
