"""Many processes record at once, and servers and writers die: nothing is lost, nothing is stored twice."""

from __future__ import annotations

import multiprocessing
import os
import time
from contextlib import contextmanager

import pytest

from kernel_pytorch.guard.history import History
from tests.history.made import make_run
from tests.history.writer import write

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.history.writer"])


@contextmanager
def writing(url: str, *, writers: int, runs: int, wait_s: float = 30.0, pause_s: float = 0.0, calm: bool = False):
    """Start writers, let them go at the same moment, and see them end well."""
    gate, state = CONTEXT.Event(), os.environ["XDG_STATE_HOME"]
    processes = [
        CONTEXT.Process(target=write, args=(url, writer, runs, wait_s, pause_s, gate, state), kwargs={"calm": calm})
        for writer in range(writers)
    ]
    for process in processes:
        process.start()
    try:
        gate.set()
        yield processes
        for process in processes:
            process.join(60)
            assert process.exitcode in (0, -9)
    finally:
        for process in processes:
            process.kill()
            process.join()


def wanted(writers: int, runs: int) -> list[str]:
    return sorted(f"{writer}-{number}" for writer in range(writers) for number in range(runs))


def stored(history: History) -> list[str]:
    return sorted(run.id for run in history.runs())


def test_eight_writers_begin_a_history_together_and_lose_nothing(url):
    with writing(url, writers=8, runs=25, calm=True):
        pass
    history = History(url)
    assert history.waiting() == []
    assert stored(history) == wanted(8, 25)


def test_a_server_that_dies_while_runs_are_recorded_loses_none(server, postgresql):
    history = History(postgresql)
    assert history.names() == []
    with writing(postgresql, writers=4, runs=50, wait_s=2, pause_s=0.02):
        deadline = time.monotonic() + 30
        while len(history.runs()) < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        server.stop("immediate")
    waiting = len(history.waiting())
    assert waiting > 0, "the server died too late to matter"
    server.start()
    receipt = history.flush()
    assert (receipt.stored, receipt.sent, receipt.waiting) == (True, waiting, 0)
    assert stored(history) == wanted(4, 50)


def test_a_server_that_restarts_while_runs_are_recorded_loses_none(server, postgresql):
    history = History(postgresql)
    assert history.names() == []
    with writing(postgresql, writers=4, runs=50, wait_s=2, pause_s=0.02):
        for _ in range(2):
            server.restart()
    history.flush()
    assert history.waiting() == []
    assert stored(history) == wanted(4, 50)


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_writers_that_are_killed_leave_what_they_recorded(database, request, tmp_path):
    url = str(tmp_path / "h.sqlite") if database == "sqlite" else request.getfixturevalue("postgresql")
    history = History(url)
    with writing(url, writers=3, runs=1000, pause_s=0.001) as processes:
        while len(history.runs()) < 30:
            time.sleep(0.01)
        for process in processes:
            process.kill()
    history.flush()
    assert history.waiting() == []
    ids = stored(history)
    assert len(ids) == len(set(ids)) >= 30
    for writer in range(3):
        numbers = sorted(int(i.split("-")[1]) for i in ids if i.startswith(f"{writer}-"))
        assert numbers == list(range(len(numbers))), "a run is missing between others"


def test_a_server_that_hangs_holds_nobody_up_for_long(server, postgresql):
    history = History(postgresql, wait_s=2)
    history.record(make_run(0))
    server.freeze()
    begin = time.monotonic()
    try:
        receipt = history.record(make_run(1))
    finally:
        server.thaw()
    assert time.monotonic() - begin < 30
    assert (receipt.stored, receipt.waiting) == (False, 1)
    assert "timeout" in receipt.message
    assert [run.id for run in history.runs()] == ["run-000000", "run-000001"]


def test_who_may_only_read_reads_and_records_later(server, postgresql):
    owner = History(postgresql)
    owner.record(make_run(0))
    database = owner.address.shown.split("/")[3].split("?")[0]
    server.sql("DROP ROLE IF EXISTS reader")
    server.sql("CREATE ROLE reader LOGIN")
    server.sql("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader", database)
    reader = History(postgresql.replace("kpt@", "reader@"))
    assert reader.runs() == [make_run(0)]
    receipt = reader.record(make_run(1))
    assert (receipt.stored, receipt.waiting) == (False, 1)
    assert "permission denied" in receipt.message
    assert reader.names() == ["training step"]
    server.sql("GRANT ALL ON ALL TABLES IN SCHEMA public TO reader", database)
    assert reader.flush().sent == 1
    assert owner.runs() == [make_run(0), make_run(1)]
    server.sql("DROP OWNED BY reader", database)
