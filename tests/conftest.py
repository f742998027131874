"""Which tests run alone: those that time something, fill the memory or the cores, or start whole searches."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SERIAL = (
    "attention/test_choice.py",
    "contracts",
    "gpu",
    "search",
    "test_examples.py",
    "unit/test_hardware_lock.py",
    "unit/test_hardware_memory.py",
    "unit/test_isolation.py",
    "unit/test_predict.py",
    "unit/test_sampler.py",
)


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # What runs in the background of a shell ignores Ctrl-C, and so would the searches that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(item.path.is_relative_to(HERE / place) for place in SERIAL):
            item.add_marker(pytest.mark.serial)
