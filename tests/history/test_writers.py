"""Many processes record at once, and servers and writers die: nothing is lost, nothing is stored twice."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import contextmanager

import pytest

from kernel_pytorch.guard.history import History
from tests.history.made import make_run
from tests.history.writer import ENOUGH, Orders, write

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.history.writer"])


@contextmanager
def writing(
    url: str, *, writers: int, runs: int = ENOUGH, wait_s: float = 30.0, pause_s: float = 0.0, calm: bool = False
):
    """Start writers, let them go at the same moment, and see them end."""
    orders = Orders(
        url,
        os.environ["XDG_STATE_HOME"],
        wait_s,
        pause_s,
        CONTEXT.Event(),
        CONTEXT.Event(),
        CONTEXT.RawArray("i", writers),
    )
    processes = [
        CONTEXT.Process(target=write, args=(orders, writer, runs), kwargs={"calm": calm}) for writer in range(writers)
    ]
    for process in processes:
        process.start()
    try:
        orders.go.set()
        yield orders, processes
        for process in processes:
            process.join(60)
            assert process.exitcode in (0, -9)
    finally:
        for process in processes:
            process.kill()
            process.join()


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def wanted(orders: Orders) -> list[str]:
    return sorted(f"{writer}-{number}" for writer, count in enumerate(orders.recorded) for number in range(count))


def stored(history: History) -> list[str]:
    return sorted(run.id for run in history.runs())


def test_eight_writers_begin_a_history_together_and_lose_nothing(url):
    with writing(url, writers=8, runs=25, calm=True) as (orders, _):
        pass
    history = History(url)
    assert list(orders.recorded) == [25] * 8
    assert history.waiting() == []
    assert stored(history) == wanted(orders)


def test_a_server_that_dies_while_runs_are_recorded_loses_none(server, postgresql):
    history = History(postgresql)
    with writing(postgresql, writers=4, wait_s=2, pause_s=0.01) as (orders, _):
        wait_for(lambda: sum(orders.recorded) > 20)
        server.stop("immediate")
        wait_for(lambda: len(history.waiting()) > 20)
        orders.stop.set()
    waiting = len(history.waiting())
    server.start()
    receipt = history.flush()
    assert (receipt.stored, receipt.sent, receipt.waiting) == (True, waiting, 0)
    assert stored(history) == wanted(orders)


def test_a_server_that_restarts_while_runs_are_recorded_loses_none(server, postgresql):
    history = History(postgresql)
    with writing(postgresql, writers=4, wait_s=2, pause_s=0.01) as (orders, _):
        for _ in range(2):
            begin = sum(orders.recorded)
            wait_for(lambda begin=begin: sum(orders.recorded) > begin + 10)
            server.restart()
        orders.stop.set()
    history.flush()
    assert history.waiting() == []
    assert stored(history) == wanted(orders)


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_writers_that_are_killed_leave_what_they_recorded(database, request, tmp_path):
    url = str(tmp_path / "h.sqlite") if database == "sqlite" else request.getfixturevalue("postgresql")
    history = History(url)
    with writing(url, writers=3, pause_s=0.001) as (orders, processes):
        wait_for(lambda: min(orders.recorded) > 10)
        for process in processes:
            process.kill()
    history.flush()
    assert history.waiting() == []
    ids = stored(history)
    assert set(wanted(orders)) <= set(ids)
    assert len(ids) <= len(wanted(orders)) + 3, "at most the run that each was at may be there besides"


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
