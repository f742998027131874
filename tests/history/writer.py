"""One of many processes that record runs at once."""

from __future__ import annotations

import os
import time
from multiprocessing.synchronize import Event

# The processes are forked from one that has imported these, so that eight of them start in a moment.
import alembic.command
import psycopg

from kernel_pytorch.guard.history import History, codec, database
from tests.history.made import make_run

PRELOADED = (alembic, psycopg, database, codec.loads(codec.dumps(make_run())))


def write(
    url: str, writer: int, runs: int, wait_s: float, pause_s: float, gate: Event, state: str, *, calm: bool
) -> None:
    """Record runs, every fifth of them twice; where it is `calm`, the database takes each at once."""
    # The environment of this process is of the time when its forkserver started.
    os.environ["XDG_STATE_HOME"] = state
    gate.wait()
    history = History(url, wait_s=wait_s)
    for number in range(runs):
        run = make_run(number, id=f"{writer}-{number}", name=f"writer {writer}")
        receipt = history.record(run)
        assert receipt.stored or not calm, receipt.message
        if number % 5 == 0:
            history.record(run)
        time.sleep(pause_s)
