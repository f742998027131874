"""Two interpreters as sides: real environments, with and without what they need."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import kernel_pytorch
from kernel_pytorch.core.types import Verdict
from kernel_pytorch.guard.compare import compare_sides
from kernel_pytorch.guard.environments import EnvironmentUnusableError, find_python, look_at, require, variables
from kernel_pytorch.guard.side_by_side import Side, SideError

TARGET = f"{Path(__file__).with_name('workloads.py')}:quick"
SOURCE = Path(str(kernel_pytorch.__file__)).resolve().parents[1]


def make_environment(where: Path, *paths: str | Path) -> Path:
    """Make an environment without pip whose packages are those of other directories."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(where)], check=True)
    packages = next((where / "lib").glob("python3*/site-packages"))
    (packages / "others.pth").write_text("\n".join(map(str, paths)))
    return where / "bin" / "python"


def packages_without(where: Path, *names: str) -> Path:
    """Return a directory of links to this environment's packages, some left out."""
    where.mkdir()
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        left_out = any(package.name.lower().replace("-", "_").startswith(name) for name in names)
        if not left_out and package.suffix != ".pth":
            (where / package.name).symlink_to(package)
    return where


def test_an_interpreter_is_a_path_a_name_or_an_environment(tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env")
    assert find_python(str(tmp_path / "env")) == find_python(str(python)) == str(python)
    assert Path(find_python("python3")).is_file()
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no program")
    for wrong, why in (
        ("nowhere/python", "does not exist"),
        ("empty", "without bin/python"),
        ("text", "not executable"),
    ):
        with pytest.raises(EnvironmentUnusableError, match=why):
            find_python(str(tmp_path / wrong))


def test_what_it_has_is_told_without_importing_it() -> None:
    found = look_at(sys.executable)
    assert {"python", "torch", "numpy", "kernel_pytorch"} <= {*found.software}
    assert set(found.found) == {"torch", "kernel_pytorch"}
    require(found, "base")


def test_a_program_that_is_no_python(tmp_path: Path) -> None:
    for script in ("#!/bin/sh\necho no JSON\n", "#!/bin/sh\necho boom >&2\nexit 3\n", "#!/nowhere\n", ""):
        fake = tmp_path / "fake"
        fake.write_text(script)
        fake.chmod(0o755)
        with pytest.raises(EnvironmentUnusableError, match="does not run as a Python"):
            look_at(str(fake))


def test_an_old_python(tmp_path: Path) -> None:
    fake = tmp_path / "python3.9"
    fake.write_text('#!/bin/sh\necho \'{"python": "3.9.1", "versions": {}, "found": []}\'\n')
    fake.chmod(0o755)
    with pytest.raises(EnvironmentUnusableError, match=r"head: .* is Python 3\.9\.1; .* needs 3\.11"):
        require(look_at(str(fake)), "head")


def test_missing_packages_name_the_exact_command(tmp_path: Path) -> None:
    bare = make_environment(tmp_path / "bare")
    with pytest.raises(EnvironmentUnusableError, match="has no torch and no kernel_pytorch") as caught:
        compare_sides(Side("base", TARGET, python=str(bare)), Side("head", TARGET))
    assert caught.value.fix.startswith(f"{bare} -m pip install torch ")
    almost = make_environment(tmp_path / "almost", packages_without(tmp_path / "links", "kernel_pytorch"))
    with pytest.raises(EnvironmentUnusableError, match="has no kernel_pytorch") as caught:
        compare_sides(Side("base", TARGET, python=str(almost)), Side("head", TARGET))
    assert caught.value.fix.startswith(f"{almost} -m pip install ")
    assert " torch" not in caught.value.fix


def test_a_dependency_that_is_missing_inside_is_told(tmp_path: Path) -> None:
    links = packages_without(tmp_path / "links", "psutil")
    python = make_environment(tmp_path / "env", links, SOURCE)
    with pytest.raises(SideError, match="has no psutil") as caught:
        compare_sides(Side("base", TARGET, python=str(python)), Side("head", TARGET))
    assert caught.value.fix == f"{python} -m pip install psutil"


def test_two_interpreters_are_compared(tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env", sysconfig.get_path("purelib"), SOURCE)
    base, head = Side("base", TARGET, python=sys.executable), Side("head", TARGET, python=str(python))
    found = compare_sides(base, head, max_seconds=5.0, max_pairs=4)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert (found.base.python, found.head.python) == (sys.executable, str(python))
    assert found.base.software["torch"] == found.head.software["torch"]


def test_variables_put_the_side_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env")
    monkeypatch.setenv("PYTHONPATH", "/one")
    monkeypatch.setenv("PYTHONHOME", "/home")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    there = variables(str(python), ("/first",), {"X": "1"})
    assert there["PYTHONPATH"] == "/first:/one"
    assert there["PATH"].startswith(f"{python.parent}:")
    assert there["VIRTUAL_ENV"] == str(tmp_path / "env")
    assert "PYTHONHOME" not in there
    assert (there["X"], there["PYTHONHASHSEED"]) == ("1", "0")
    plain = variables(None, (), {}, own_path=False)
    assert plain["PYTHONPATH"] == "/one"
    monkeypatch.delenv("PYTHONPATH")
    assert "PYTHONPATH" not in variables(None, (), {}, own_path=False)
    assert sysconfig.get_path("purelib") in variables(None, (), {})["PYTHONPATH"]
