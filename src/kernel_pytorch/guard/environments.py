"""Python environments as sides: what an interpreter has, what it lacks, and the command that mends it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from kernel_pytorch.errors import KptError

__all__ = [
    "Environment",
    "EnvironmentUnusableError",
    "find_python",
    "inside",
    "install_command",
    "look_at",
    "require",
    "variables",
]

_LIMIT_S = 60.0
_OLDEST = (3, 11)
_WATCHED = ("torch", "triton", "kernel-pytorch", "numpy", "transformers", "torchao", "timm", "torchvision")
_PROBE = """
import json, sys
from importlib import metadata, util
if sys.path and sys.path[0] == "": del sys.path[0]
versions = {}
for name in sys.argv[1:]:
    try:
        versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
found = [n for n in ("torch", "kernel_pytorch") if util.find_spec(n) is not None]
print(json.dumps({"python": sys.version.split()[0], "versions": versions, "found": found}))
"""


class EnvironmentUnusableError(KptError):
    """An interpreter cannot be run, or lacks what a side needs; the fix is the command that installs it."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What an interpreter has.

    Attributes:
        python: Its absolute path.
        software: Versions by name, `python` among them.
        found: Which of `torch` and `kernel_pytorch` it can import.
    """

    python: str
    software: Mapping[str, str]
    found: tuple[str, ...]


def find_python(python: str) -> str:
    """Return the absolute path of an interpreter: a path, a name on the PATH, or the directory of an environment.

    Links are kept, since an environment's interpreter is a link out of it.

    Raises:
        EnvironmentUnusableError: There is none.
    """
    path = Path(python).expanduser()
    if path.is_dir():
        if not (path / "bin" / "python").exists():
            raise EnvironmentUnusableError(f"{path} is a directory without bin/python", fix=f"{path}/bin/python")
        path = path / "bin" / "python"
    found = shutil.which(path)
    if found is None:
        why = "is not executable" if path.exists() else "does not exist"
        raise EnvironmentUnusableError(f"interpreter {python} {why}", fix="give its path: ENVIRONMENT/bin/python")
    return os.path.abspath(found)  # noqa: PTH100  resolve() would leave the environment


def look_at(python: str, environment: Mapping[str, str] | None = None) -> Environment:
    """Ask an interpreter what it has; imports nothing heavy in it.

    Raises:
        EnvironmentUnusableError: It cannot be run, or is no Python.
    """
    path = find_python(python)
    try:
        done = subprocess.run(
            [path, "-c", _PROBE, *_WATCHED],
            env=None if environment is None else dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_LIMIT_S,
            check=False,
        )
        said = json.loads(done.stdout.decode(errors="replace").strip().splitlines()[-1]) if not done.returncode else {}
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        raise EnvironmentUnusableError(f"{path} does not run as a Python interpreter: {error}") from error
    if not isinstance(said, dict) or "python" not in said:
        tail = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise EnvironmentUnusableError(f"{path} does not run as a Python interpreter: {tail}")
    software = {name.replace("kernel-pytorch", "kernel_pytorch"): str(v) for name, v in said["versions"].items()}
    return Environment(path, {**software, "python": said["python"]}, tuple(said["found"]))


def require(environment: Environment, label: str) -> None:
    """Refuse an environment that cannot run a target.

    Raises:
        EnvironmentUnusableError: It lacks torch or this package, or its Python is too old; with the pip command.
    """
    version = tuple(int(part) for part in environment.software["python"].split(".")[:2])
    if version < _OLDEST:
        raise EnvironmentUnusableError(
            f"{label}: {environment.python} is Python {environment.software['python']}; "
            f"kernel_pytorch needs {'.'.join(map(str, _OLDEST))} or newer"
        )
    missing = [name for name in ("torch", "kernel_pytorch") if name not in environment.found]
    if missing:
        raise EnvironmentUnusableError(
            f"{label}: {environment.python} has no {' and no '.join(missing)}",
            fix=install_command(environment.python, missing),
        )


def install_command(python: str, missing: list[str]) -> str:
    """Return the pip command that installs what is missing; this package from the checkout it runs from, if any."""
    root = Path(__file__).resolve().parents[3]
    package = (
        str(root) if (root / "pyproject.toml").is_file() else f"kernel-pytorch=={metadata.version('kernel-pytorch')}"
    )
    names = [package if name == "kernel_pytorch" else name for name in missing]
    return shlex.join([python, "-m", "pip", "install", *names])


def variables(
    python: str | None,
    pythonpath: Sequence[str],
    extra: Mapping[str, str],
    *,
    own_path: bool = True,
    avoid: Path | None = None,
) -> dict[str, str]:
    """Return the environment variables of a side's process.

    Args:
        python: Its interpreter, whose commands then come first on the PATH; `None` is this one.
        pythonpath: What comes first on the PYTHONPATH.
        extra: Variables that go before everything else.
        own_path: Whether a process of this interpreter finds what this one finds, by its `sys.path`.
        avoid: A checkout whose directories are left out of the PYTHONPATH, its virtual environments apart.
    """
    found = dict(os.environ)
    rest = found.get("PYTHONPATH", "").split(os.pathsep)
    if python is not None:
        found["PATH"] = os.pathsep.join([str(Path(python).parent), found.get("PATH", os.defpath)])
        found.pop("PYTHONHOME", None)
        if (Path(python).parents[1] / "pyvenv.cfg").is_file():
            found["VIRTUAL_ENV"] = str(Path(python).parents[1])
    elif own_path:
        rest = sys.path
    entries = [os.path.abspath(entry) for entry in rest if entry]  # noqa: PTH100  links are kept
    kept = [entry for entry in entries if avoid is None or not inside(entry, avoid)]
    if entries := [*dict.fromkeys([*pythonpath, *kept])]:
        found["PYTHONPATH"] = os.pathsep.join(entries)
    else:
        found.pop("PYTHONPATH", None)
    found.setdefault("PYTHONHASHSEED", "0")  # the same order of sets on both sides
    found.update(extra)
    return found


def inside(entry: str, checkout: Path) -> bool:
    """Return whether a directory of a `sys.path` is source of a checkout, rather than something installed in it."""
    path = Path(entry).resolve()
    return path.is_relative_to(checkout.resolve()) and not any(
        part in ("site-packages", "dist-packages", "lib-dynload") or part.startswith("python3") for part in path.parts
    )
