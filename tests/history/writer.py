"""One of many processes that record runs at once."""

from __future__ import annotations

import os
import time
from collections.abc import MutableSequence
from dataclasses import dataclass
from multiprocessing.synchronize import Event

# The processes are forked from one that has imported these, so that eight of them start in a moment.
import alembic.command
import psycopg

from kernel_pytorch.guard.history import History, codec, database
from tests.history.made import make_run

PRELOADED = (alembic, psycopg, database, codec.loads(codec.dumps(make_run())))
ENOUGH = 5000


@dataclass
class Orders:
    """What writers share: `recorded` counts the runs that each knows to be kept; a lock would die with its holder."""

    url: str
    state: str
    wait_s: float
    pause_s: float
    go: Event
    stop: Event
    recorded: MutableSequence[int]


def write(orders: Orders, writer: int, runs: int, *, calm: bool) -> None:
    """Record runs until told to stop, every fifth twice; where it is `calm`, the database takes each at once."""
    # The environment of this process is of the time when its forkserver started.
    os.environ["XDG_STATE_HOME"] = orders.state
    orders.go.wait()
    history = History(orders.url, wait_s=orders.wait_s)
    for number in range(runs):
        run = make_run(number, id=f"{writer}-{number}", name=f"writer {writer}")
        receipt = history.record(run)
        assert receipt.stored or not calm, receipt.message
        orders.recorded[writer] = number + 1
        if number % 5 == 0:
            history.record(run)
        if orders.stop.is_set():
            return
        time.sleep(orders.pause_s)
