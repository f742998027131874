"""Kernels run here under Triton's interpreter, which has to be chosen before triton is imported: in a subprocess.

A test that takes the fixture `interpreter` runs only there. Each test module has one test that starts the subprocess on
its own file: `run_interpreted(__file__)`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def run_interpreted(path: str, timeout: float = 250) -> None:
    """Run the tests of a module that take `interpreter`; all must pass, and there must be some."""
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout[-2000:]
    assert int(passed[1]) > 0
