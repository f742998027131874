"""Which tests run alone: those whose verdict is about time, or about the memory of this process."""

from __future__ import annotations

import gc
import getpass
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SERIAL = (
    "attention/test_choice.py",
    "contracts",
    "gpu",
    "unit/test_hardware_memory.py",
    "unit/test_predict.py",
    "unit/test_sampler.py",
)


def own_temporary_directory(worker: str) -> str:
    """Give a worker of pytest-xdist a temporary directory, where the lock of the device lies, of its own.

    Measurements of one machine wait for each other: a trial would wait for those of the other worker's test until its
    time is up. What Inductor keeps there is still shared: its precompiled headers take longer than most tests.
    """
    inductor = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    inductor.mkdir(exist_ok=True)
    tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix=f"kpt-{worker}-")
    Path(tempfile.tempdir, inductor.name).symlink_to(inductor)
    return tempfile.tempdir


TEMPORARY = own_temporary_directory(os.environ["PYTEST_XDIST_WORKER"]) if "PYTEST_XDIST_WORKER" in os.environ else None

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # What runs in the background of a shell ignores Ctrl-C, and so would the searches that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(item.path.is_relative_to(HERE / place) for place in SERIAL):
            item.add_marker(pytest.mark.serial)


def pytest_collection_finish() -> None:
    """Keep the modules and items that there are now out of later garbage collections.

    They live as long as the session, and there are so many that a `gc.collect()` takes a quarter of a second: as long
    as the whole trial of a small model that calls it.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:  # pytest-xdist may end a worker before its `pytest_unconfigure`
    gc.unfreeze()  # else what ends with the interpreter is told as leaked
    if TEMPORARY is not None:
        shutil.rmtree(TEMPORARY, ignore_errors=True)
