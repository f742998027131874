"""Kernels run here under Triton's interpreter, which has to be chosen before triton is imported: in a subprocess.

A test that takes the fixture `interpreter` runs only there. Each test module has one test that starts the subprocess on
its own file: `run_interpreted(__file__)`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.forks import run_interpreted

__all__ = ["run_interpreted"]

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def belongs(item: pytest.Item) -> bool:
        return HERE not in item.path.parents or ("interpreter" in getattr(item, "fixturenames", ())) == INTERPRETED

    config.hook.pytest_deselected(items=[item for item in items if not belongs(item)])
    items[:] = [item for item in items if belongs(item)]


@pytest.fixture
def interpreter() -> None:
    """Marks a test that launches kernels on CPU tensors."""
    assert INTERPRETED
