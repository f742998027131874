"""The example of docs/adding-a-kernel.md works as it is printed there: interpreted, and compiled for every target."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "adding-a-kernel.md"
CONFTEST = """
import kernel_pytorch.ops

kernel_pytorch.ops.__path__.append({path!r})
"""
COMPILE = """
import kernel_pytorch.ops

kernel_pytorch.ops.__path__.append({path!r})
from kernel_pytorch._triton.targets import TARGETS, compile_case
from kernel_pytorch.ops.relu_squared.relu_squared_kernel import COMPILE_CASES

print(sum(bool(compile_case(case, target).asm) for case in COMPILE_CASES for target in TARGETS))
"""


def test_the_documents_example_works(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    sections = re.split(r"^## ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    blocks = {}
    for section in sections:
        code = re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)
        if code:
            blocks[re.findall(r"`(.*?)`", section.splitlines()[0])[-1]] = code[1]
    package = tmp_path / "ops" / "relu_squared"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    names = {"reference.py", "relu_squared_kernel.py", "op.py", "api.py"}
    assert {name.rpartition("/")[2] for name in blocks} == names | {"test_relu_squared.py"}
    for name in names:
        (package / name).write_text(blocks[f"ops/relu_squared/{name}"], encoding="utf-8")
    tests = tmp_path / "tests"
    tests.mkdir()
    path = str(package.parent)
    fixture = "import pytest\n\n\n@pytest.fixture\ndef interpreter():\n    pass\n"
    (tests / "conftest.py").write_text(CONFTEST.format(path=path) + fixture, encoding="utf-8")
    (tests / "test_relu_squared.py").write_text(blocks["tests/ops/test_relu_squared.py"], encoding="utf-8")
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", str(tests)]
    for command, environment, wanted in (
        (run, {"TRITON_INTERPRET": "1"}, "13 passed"),
        ([sys.executable, "-W", "error", "-c", COMPILE.format(path=path)], {}, "16"),
    ):
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=tmp_path, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert wanted in done.stdout, done.stdout
