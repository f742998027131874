"""Two revisions of a git repository as sides, each in a worktree of its own that is removed afterwards.

The user's own files are never touched: nothing is checked out over them, nothing stashed. A worktree lies in the
temporary directory, under a name that tells which process made it, so that one whose process was killed is found and
removed by the next run; where the directory is gone already, `git worktree prune` knows.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from kernel_pytorch.errors import KptError
from kernel_pytorch.guard.environments import inside
from kernel_pytorch.guard.processes import terminable
from kernel_pytorch.guard.side_by_side import Side

__all__ = [
    "Checkout",
    "RevisionError",
    "checked_out",
    "commit_of",
    "git",
    "provenance",
    "revision_sides",
    "run_git",
    "side_at",
    "top_level",
]

_PREFIX = "kpt-worktree-"
_LIMIT_S = 300.0
_OPTIONS = ("-c", f"core.hooksPath={os.devnull}", "-c", "core.quotePath=off", "-c", "color.ui=off")
_OURS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY")
"""What git sets for a hook it runs, and what would send our commands to the wrong place."""


class RevisionError(KptError):
    """A revision is unknown, the checkout has changes, or git cannot do what is needed."""


@dataclass(frozen=True, slots=True)
class Checkout:
    """The files of one revision.

    Attributes:
        name: As the user called it.
        commit: In full.
        root: The directory of the files.
        repository: The user's own checkout; equal to `root` where that itself is the side.
        dirty: Whether it has changes that no commit holds.
    """

    name: str
    commit: str
    root: Path
    repository: Path
    dirty: bool = False


def run_git(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git in a directory, in no hook's repository and without the user's own hooks, and return what came of it.

    Raises:
        RevisionError: There is no git or no such directory, or it does not end.
    """
    environment = {k: v for k, v in os.environ.items() if k not in _OURS}
    environment |= {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"}
    try:
        return subprocess.run(
            ["git", *_OPTIONS, *arguments],  # noqa: S607  the user's git, from the PATH
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LIMIT_S,
            check=False,
        )
    except FileNotFoundError as error:
        if not directory.is_dir():
            raise RevisionError(f"no directory {directory}") from error
        raise RevisionError("git is not installed", fix="install git") from error
    except subprocess.TimeoutExpired as error:
        raise RevisionError(f"git {arguments[0]} took more than {_LIMIT_S:.0f} s in {directory}") from error


def git(directory: Path, *arguments: str) -> str:
    """Return what git prints.

    Raises:
        RevisionError: As `run_git`; or git refuses, with what it says.
    """
    done = run_git(directory, *arguments)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RevisionError(f"git {' '.join(arguments[:2])} in {directory}: {said.removeprefix('fatal: ')}")
    return done.stdout.strip("\n")


def top_level(directory: Path | None = None) -> Path:
    """Return the root of the checkout that a directory is in.

    Raises:
        RevisionError: It is in none.
    """
    where = (directory or Path.cwd()).resolve()
    done = run_git(where, "rev-parse", "--show-toplevel")
    if done.returncode or not done.stdout.strip():
        raise RevisionError(
            f"{where} is in no git checkout", fix="run it inside the repository whose revisions you name"
        )
    return Path(done.stdout.strip()).resolve()


def commit_of(revision: str, repository: Path) -> str:
    """Return the full commit of a revision.

    Raises:
        RevisionError: There is none of that name; with near names, and how to fetch it where the clone is shallow.
    """
    if revision.strip() and not revision.startswith("-"):
        done = run_git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
        if not done.returncode and done.stdout.strip():
            return done.stdout.strip().splitlines()[-1]
    names = run_git(repository, "for-each-ref", "--format=%(refname:short)").stdout.split()
    near = difflib.get_close_matches(revision, [n for n in names if n], n=3, cutoff=0.6)
    message = f"unknown revision {revision!r} in {repository}"
    if near:
        message += f"; did you mean {' or '.join(map(repr, near))}?"
    shallow = run_git(repository, "rev-parse", "--is-shallow-repository").stdout.strip() == "true"
    fix = (
        "git fetch --unshallow (in GitHub Actions: actions/checkout with fetch-depth: 0)"
        if shallow
        else "git fetch --all"
    )
    raise RevisionError(message, fix=fix)


def changes(repository: Path) -> list[str]:
    """Return the tracked files that differ from the checked-out commit, those of submodules among them."""
    done = run_git(repository, "status", "--porcelain", "--untracked-files=no")
    return [line[3:] for line in done.stdout.splitlines() if line.strip()]


def provenance(path: Path) -> tuple[str, bool]:
    """Return the commit that a file or directory is of, and whether its checkout has changes that no commit holds.

    Empty and False where no commit has it: outside of a repository, without git, or not tracked.
    """
    directory = path if path.is_dir() else path.parent
    try:
        tracked = run_git(directory, "ls-files", "--error-unmatch", str(path.resolve()))
        head = run_git(directory, "rev-parse", "--verify", "--quiet", "HEAD")
        if tracked.returncode or head.returncode:
            return "", False
        return head.stdout.strip(), bool(changes(directory))
    except RevisionError:
        return "", False


@contextlib.contextmanager
def checked_out(
    base: str, head: str, *, repository: Path | None = None, allow_dirty: bool = False
) -> Iterator[tuple[Checkout, Checkout]]:
    """Give two revisions as directories, which are gone afterwards.

    Args:
        base: The old revision: anything that names a commit.
        head: The new one.
        repository: A directory of the checkout; by default the working directory.
        allow_dirty: Where `head` is the checked-out commit and the checkout has changes: compare the checkout as it
            is, changes included, instead of refusing.

    Raises:
        RevisionError: Unknown revision, changes that no commit holds, or git fails.
    """
    root = top_level(repository)
    commits = [commit_of(name, root) for name in (base, head)]
    dirty = changes(root) if commits[1] == run_git(root, "rev-parse", "HEAD").stdout.strip() else []
    if dirty and not allow_dirty:
        shown = ", ".join(dirty[:3]) + (f" and {len(dirty) - 3} more" if len(dirty) > 3 else "")
        raise RevisionError(
            f"{head} is checked out in {root} with changes that no commit holds: {shown}",
            fix="git commit or git stash them, or compare the checkout as it is with --allow-dirty",
        )
    _remove_left_over(root)
    with terminable(), contextlib.ExitStack() as stack:
        scratch = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-")).resolve()
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        found = []
        for label, name, commit in zip(("base", "head"), (base, head), commits, strict=True):
            if label == "head" and dirty:
                found.append(Checkout(name, commit, root, root, dirty=True))
                continue
            path = scratch / label
            stack.callback(_remove, root, path)
            git(root, "worktree", "add", "--detach", "--force", str(path), commit)
            found.append(Checkout(name, commit, path, root))
        yield found[0], found[1]


def _remove(root: Path, path: Path) -> None:
    """Remove a worktree, whatever was written into it, and what git remembers of it."""
    run_git(root, "worktree", "remove", "--force", "--force", str(path))
    shutil.rmtree(path, ignore_errors=True)
    run_git(root, "worktree", "prune")


def _remove_left_over(root: Path) -> None:
    """Remove worktrees of this repository whose process was killed before it could."""
    for line in run_git(root, "worktree", "list", "--porcelain").stdout.splitlines():
        path = Path(line.removeprefix("worktree "))
        if not line.startswith("worktree ") or not path.parent.name.startswith(_PREFIX):
            continue
        owner = path.parent.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            _remove(root, path)
            shutil.rmtree(path.parent, ignore_errors=True)


def side_at(
    checkout: Checkout,
    label: str,
    *,
    target: str | None = None,
    command: tuple[str, ...] | None = None,
    directory: Path | None = None,
    **options: object,
) -> Side:
    """Return a side that runs the files of a checkout.

    A target's path is taken inside the checkout; one outside of the repository serves both revisions as it is. The
    checkout's `src` (where it has one) and its root come first on the PYTHONPATH, and directories of the user's own
    checkout on the PYTHONPATH become those of this one.

    Args:
        checkout: The files.
        label: Of the side.
        target: As `kpt` takes it.
        command: Instead of a target.
        directory: Where the user stands; the side stands at the same place in the checkout.
        options: The rest of `Side`.

    Raises:
        RevisionError: The revision has no such file.
    """
    here = (directory or Path.cwd()).resolve()
    working = (
        checkout.root / here.relative_to(checkout.repository) if here.is_relative_to(checkout.repository) else here
    )
    if not working.is_dir():
        working = checkout.root
    own = checkout.root == checkout.repository
    return Side(
        label,
        target=None if target is None else _target_in(target, checkout, here),
        command=command,
        directory=working,
        pythonpath=_pythonpath(checkout),
        revision=checkout.commit,
        dirty=checkout.dirty,
        avoid=None if own else checkout.repository,
        **options,  # type: ignore[arg-type]
    )


@contextlib.contextmanager
def revision_sides(
    base: str,
    head: str,
    *,
    target: str | None = None,
    command: tuple[str, ...] | None = None,
    repository: Path | None = None,
    allow_dirty: bool = False,
    **options: object,
) -> Iterator[tuple[Side, Side]]:
    """Give two revisions as sides; their worktrees are gone afterwards. See `checked_out` and `side_at`.

    Raises:
        RevisionError: See there.
    """
    with checked_out(base, head, repository=repository, allow_dirty=allow_dirty) as (old, new):
        yield (
            side_at(old, "base", target=target, command=command, directory=repository, **options),
            side_at(new, "head", target=target, command=command, directory=repository, **options),
        )


def _target_in(target: str, checkout: Checkout, here: Path) -> str:
    """Return a target with its path inside a checkout; targets without a path, and paths elsewhere, as they are."""
    scheme, _, rest = target.partition(":")
    prefix, text = (f"{scheme}:", rest) if scheme == "hf" else ("", target)
    path, colon, factory = (text, "", "") if prefix or text.endswith(".pt2") else text.rpartition(":")
    looks_like_file = path.endswith((".py", ".pt2")) or "/" in path
    if scheme in ("timm", "torchvision") or not looks_like_file:
        return target
    full = Path(os.path.abspath(here / Path(path).expanduser()))  # noqa: PTH100  a link of the checkout stays one
    if not full.is_relative_to(checkout.repository):
        if prefix and not full.exists():
            return target  # the name of a model on the hub
        return f"{prefix}{full}{colon}{factory}"
    mapped = checkout.root / full.relative_to(checkout.repository)
    if prefix and not full.exists() and not mapped.exists():
        return target
    if not mapped.exists():
        hint = "git does not track it" if full.exists() else "there is none in the checkout either"
        raise RevisionError(
            f"revision {checkout.name} has no {full.relative_to(checkout.repository)} ({hint})",
            fix="commit it, or copy it to a place outside of the repository, from where it serves both revisions",
        )
    return f"{prefix}{mapped}{colon}{factory}"


def _pythonpath(checkout: Checkout) -> tuple[str, ...]:
    own = [checkout.root / "src", checkout.root] if (checkout.root / "src").is_dir() else [checkout.root]
    mapped = [
        checkout.root / Path(entry).resolve().relative_to(checkout.repository)
        for entry in sys.path
        if entry and inside(entry, checkout.repository)
    ]
    return tuple(dict.fromkeys(map(str, [*own, *(path for path in mapped if path.is_dir())])))
