"""Two revisions as sides: worktrees that come and go, paths inside them, and what is refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import kernel_pytorch
from kernel_pytorch.core.types import Verdict
from kernel_pytorch.guard.compare import compare_sides
from kernel_pytorch.guard.revisions import RevisionError, checked_out, commit_of, provenance, revision_sides, top_level
from kernel_pytorch.guard.side_by_side import SideError

BENCH = """
import torch
from torch import nn
from {package}.speed import LAYERS
from kernel_pytorch import Workload


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        for _ in range(LAYERS):
            x = torch.relu(self.linear(x))
        return x


def workload():
    return Workload(model=Net, inputs=lambda: torch.randn(32, 64))
"""


def git(root: Path, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment |= {
        **{f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
        "GIT_CONFIG_GLOBAL": os.devnull,
    }
    done = subprocess.run(["git", *arguments], cwd=root, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(root: Path, message: str) -> str:
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", message)
    return git(root, "rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A package with a src layout in two revisions, `quick` and `main`, and a benchmark beside it."""
    root = tmp_path / "repo"
    (root / "src" / "netpack").mkdir(parents=True)
    (root / "bench").mkdir()
    git(root, "init", "-q", "-b", "main")
    (root / "src" / "netpack" / "__init__.py").write_text("")
    (root / "src" / "netpack" / "speed.py").write_text("LAYERS = 2\n")
    (root / "bench" / "net.py").write_text(BENCH.format(package="netpack"))
    commit(root, "first")
    git(root, "tag", "quick")
    (root / "src" / "netpack" / "speed.py").write_text("LAYERS = 20\n")
    (root / "bench" / "new.py").write_text(BENCH.format(package="netpack"))
    commit(root, "slower")
    return root


@pytest.fixture
def inside(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(repository)
    yield repository
    assert git(repository, "worktree", "list").count("\n") == 0, "a worktree was left behind"


def worktrees(root: Path) -> list[Path]:
    lines = git(root, "worktree", "list", "--porcelain").splitlines()
    return [Path(line.removeprefix("worktree ")) for line in lines if line.startswith("worktree ")]


def test_each_revision_is_a_directory_that_goes_away(inside: Path) -> None:
    with checked_out("quick", "main") as (base, head):
        assert (base.root / "src/netpack/speed.py").read_text() == "LAYERS = 2\n"
        assert (head.root / "src/netpack/speed.py").read_text() == "LAYERS = 20\n"
        assert base.commit == git(inside, "rev-parse", "quick") != head.commit
        (base.root / "written").write_text("by a side")
        roots = base.root, head.root
    assert not any(root.exists() for root in roots)
    assert git(inside, "status", "--porcelain") == ""


def test_worktrees_go_away_when_the_body_raises(inside: Path) -> None:
    with pytest.raises(KeyboardInterrupt), checked_out("quick", "main"):
        raise KeyboardInterrupt


def test_a_target_is_taken_inside_its_revision(inside: Path, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere.py"
    outside.write_text("")
    with checked_out("quick", "main"):
        pass
    with revision_sides("quick", "main", target="bench/net.py:workload") as (base, head):
        for side, layers in ((base, "2"), (head, "20")):
            root = Path(side.directory or "")
            assert side.target == f"{root}/bench/net.py:workload"
            assert side.pythonpath[:2] == (f"{root}/src", str(root))
            assert side.avoid == inside
            code = "from netpack.speed import LAYERS; print(LAYERS)"
            done = subprocess.run(
                [sys.executable, "-c", code], env=side.environment, cwd=root, capture_output=True, text=True
            )
            assert done.stdout.strip() == layers, done.stderr
    with revision_sides("quick", "main", target=f"{outside}:workload") as (base, head):
        assert base.target == head.target == f"{outside}:workload"
    with revision_sides("quick", "main", target="netpack.zoo:workload") as (base, _):
        assert base.target == "netpack.zoo:workload"
    with revision_sides("quick", "main", target="hf:org/model") as (base, _):
        assert base.target == "hf:org/model"


def test_the_working_directory_is_that_of_the_user_inside_the_revision(
    inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inside / "bench")
    with revision_sides("quick", "main", target="net.py:workload") as (base, _):
        assert base.directory is not None
        assert base.directory.name == "bench"
        assert base.target == f"{base.directory}/net.py:workload"


def test_directories_of_the_checkout_on_the_path_become_those_of_the_revision(
    inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(inside / "bench"))
    with revision_sides("quick", "main", command=("true",)) as (base, _):
        entries = base.environment["PYTHONPATH"].split(os.pathsep)
    assert str(inside / "bench") not in entries
    assert any(entry.endswith("/base/bench") for entry in entries)


def test_a_target_that_a_revision_lacks(inside: Path) -> None:
    with (
        pytest.raises(RevisionError, match=r"revision quick has no bench/new\.py") as caught,
        revision_sides("quick", "main", target="bench/new.py:workload"),
    ):
        pass
    assert "outside of the repository" in caught.value.fix


def test_unknown_revisions_name_what_is_near(inside: Path) -> None:
    with pytest.raises(RevisionError, match=r"unknown revision 'quik'.*did you mean 'quick'"):
        commit_of("quik", inside)
    for strange in ("", "--help", "nothing\nlike it", "HEAD:bench/net.py"):
        with pytest.raises(RevisionError, match="unknown revision"):
            commit_of(strange, inside)


def test_shallow_clones_say_how_to_fetch(repository: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{repository}", "shallow")
    with pytest.raises(RevisionError) as caught:
        commit_of("quick", tmp_path / "shallow")
    assert "fetch-depth: 0" in caught.value.fix


def test_changes_that_no_commit_holds_are_refused_or_compared(inside: Path) -> None:
    (inside / "src/netpack/speed.py").write_text("LAYERS = 3\n")
    with pytest.raises(RevisionError, match=r"src/netpack/speed.py") as caught, checked_out("quick", "HEAD"):
        pass
    assert "stash" in caught.value.fix
    assert "--allow-dirty" in caught.value.fix
    with revision_sides("HEAD", "HEAD", command=("true",), allow_dirty=True) as (base, head):
        assert head.directory == inside
        assert head.dirty
        assert head.avoid is None
        assert not base.dirty
        assert base.directory != inside
    with checked_out("main", "quick") as (_, head_checkout):
        assert not head_checkout.dirty  # another commit than the one with the changes


def test_outside_of_a_repository(tmp_path: Path) -> None:
    with pytest.raises(RevisionError, match="in no git checkout"):
        top_level(tmp_path)


def test_hooks_and_variables_of_git_do_not_interfere(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = inside / ".git" / "hooks" / "post-checkout"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    with checked_out("quick", "main") as (base, _):
        assert base.root.is_dir()


def test_provenance_is_of_tracked_files_alone(inside: Path, tmp_path: Path) -> None:
    head = git(inside, "rev-parse", "HEAD")
    assert provenance(inside / "bench" / "net.py") == (head, False)
    (inside / "bench" / "net.py").write_text("")
    assert provenance(inside / "bench" / "net.py") == (head, True)
    (inside / "scratch.py").write_text("")
    assert provenance(inside / "scratch.py") == ("", False)
    assert provenance(tmp_path) == ("", False)


def test_worktrees_of_a_killed_process_are_removed_by_the_next(inside: Path, tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(
        textwrap.dedent("""
        import time
        from kernel_pytorch.guard.revisions import checked_out
        with checked_out("quick", "main"):
            print("ready", flush=True)
            time.sleep(600)
        """)
    )
    for number, left in ((signal.SIGTERM, 1), (signal.SIGKILL, 3)):
        with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as driver:
            assert driver.stdout is not None
            assert driver.stdout.readline() == "ready\n"
            assert len(worktrees(inside)) == 3
            driver.send_signal(number)
        assert len(worktrees(inside)) == left
    old = worktrees(inside)[1:]
    with checked_out("quick", "main"):
        assert not any(path.parent.exists() for path in old)


def test_a_slower_revision_fails(inside: Path) -> None:
    with revision_sides("quick", "main", target="bench/net.py:workload") as (base, head):
        found = compare_sides(base, head, max_seconds=20.0, max_pairs=20)
    assert found.verdict is Verdict.FAIL, found
    assert found.base.revision == git(inside, "rev-parse", "quick")
    assert found.head.revision == git(inside, "rev-parse", "main")


def test_code_of_the_checkout_itself_is_refused(inside: Path) -> None:
    """An editable install that the revision does not shadow would compare the checkout with itself."""
    (inside / "lib").mkdir()
    (inside / "lib" / "stray.py").write_text("LAYERS = 1\n")
    (inside / "bench" / "net.py").write_text(
        f"import sys\nsys.path.append({str(inside / 'lib')!r})\nimport stray\n" + BENCH.format(package="netpack")
    )
    commit(inside, "strays")
    with (
        revision_sides("HEAD", "HEAD", target="bench/net.py:workload") as (base, head),
        pytest.raises(SideError, match="runs code of the checkout itself") as caught,
    ):
        compare_sides(base, head)
    assert "stray.py" in str(caught.value)


def test_each_side_runs_its_own_revision_of_this_package_even_without_a_guard(tmp_path: Path) -> None:
    root = tmp_path / "own"
    package = root / "src" / "kernel_pytorch"
    shutil.copytree(
        Path(kernel_pytorch.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "guard", "report")
    )
    git(root, "init", "-q", "-b", "main")
    version = package / "__init__.py"
    version.write_text(version.read_text().replace('__version__ = "', '__version__ = "0.0.0+old."'[:-1]))
    (root / "net.py").write_text(
        BENCH.format(package="netpack").replace("from netpack.speed import LAYERS", "LAYERS = 2")
    )
    commit(root, "before the guard")
    version.write_text(version.read_text().replace("0.0.0+old.", "0.0.0+new."))
    commit(root, "after")
    with revision_sides("HEAD~1", "HEAD", target="net.py:workload", repository=root) as (base, head):
        found = compare_sides(base, head, max_seconds=5.0, max_pairs=4)
    assert found.base.software["kernel_pytorch"].startswith("0.0.0+old.")
    assert found.head.software["kernel_pytorch"].startswith("0.0.0+new.")
    assert len(found.head_samples_ms) == 4
