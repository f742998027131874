"""Which packages a TPU needs, which of their versions go together, and what to do where they do not.

Every rule here stands for a failure that was seen: an abort in a C++ library, an undefined symbol, a lock file that
another process holds. They are told before the package is loaded, since several of them end the process.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from kernel_pytorch.core.types import Skip

__all__ = ["PINS", "PLUGIN", "Installation", "Problem", "Use", "blocking", "installation", "problems"]

PLUGIN = "fastatomstruct-xla-cpu"
"""An unmodified build of XLA's CPU plugin (PJRT), on which TorchTPU runs without a TPU."""

PINS: Mapping[str, str] = {
    "torch": "2.13.0",
    "torch_tpu": "0.2.0",
    "libtpu": "0.0.52",
    "jax": "0.10.2",
    "torch_xla": "2.9.0",
    PLUGIN: "2026.6.23",
}
"""The versions that `make test-tpu` installs and tests; `tests/tpu/environments` pins the same."""

_TORCH_FOR_TORCH_TPU = ((2, 11), (2, 15))
_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_LOCK = Path("/tmp/libtpu_lockfile")  # noqa: S108  libtpu's own place
_RUNTIMES = frozenset({"torch_tpu", "torch_xla", "torchax"})
"""Packages that register a device with torch, by the name they are imported by."""


class Use(StrEnum):
    """What a problem stands in the way of."""

    TORCH_TPU = "torch_tpu"
    """TorchTPU on a chip."""
    EMULATION = "emulation"
    """TorchTPU on XLA's CPU plugin, for tests without a TPU."""
    TORCH_XLA = "torch_xla"
    """PyTorch/XLA, on a chip or on the CPU."""
    AHEAD_OF_TIME = "ahead-of-time"
    """Compiling for a TPU that is not there."""


@dataclass(frozen=True, slots=True)
class Installation:
    """What is installed, loaded and set; `installation()` reads this process's.

    Attributes:
        versions: Installed distributions by name as in `PINS`, and `jaxlib`.
        jax_libtpu: The release of libtpu that the installed jax asks for (`0.0.42.*`); empty where it does not tell.
        loaded: Names of the runtimes that this process has imported.
        environment: Environment variables; what decides whether torch loads torch_tpu by itself is as the process was
            started with, for kpt then sets it.
        tools: Programs on the path, of those asked for (`gcc`).
        lock_holder: Process that holds libtpu's lock, another than this one; 0 for none.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    jax_libtpu: str = ""
    loaded: frozenset[str] = frozenset()
    environment: Mapping[str, str] = field(default_factory=dict)
    tools: frozenset[str] = frozenset()
    lock_holder: int = 0

    def has(self, name: str) -> bool:
        """Return whether a distribution is installed."""
        return name in self.versions


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, what it stands in the way of, and what mends it.

    Attributes:
        name: A short identity: `libtpu-version`.
        reason: What is wrong, with what it leads to.
        fix: A command or a step; never empty.
        blocks: The uses that fail; empty for one that only costs.
    """

    name: str
    reason: str
    fix: str
    blocks: frozenset[Use] = frozenset()

    @property
    def skip(self) -> Skip:
        """The same as a reason to skip."""
        return Skip(self.reason, self.fix)


def installation() -> Installation:
    """Return what this process has: reads metadata, imports none of the packages."""
    names = (*PINS, "jaxlib")
    versions = {name: version for name in names if (version := _version(name))}
    return Installation(
        versions=versions,
        jax_libtpu=_jax_libtpu(_requirements("jax")),
        loaded=_RUNTIMES & frozenset(sys.modules),
        environment={**os.environ, _AUTOLOAD: _as_started(_AUTOLOAD)},
        tools=frozenset(tool for tool in ("gcc",) if shutil.which(tool)),
        lock_holder=_lock_holder(_LOCK, Path("/proc/locks"), os.getpid()),
    )


def problems(found: Installation | None = None) -> tuple[Problem, ...]:
    """Return what is wrong with the TPU packages of an installation; nothing is wrong where none is installed.

    Args:
        found: The installation; this process's by default.
    """
    found = installation() if found is None else found
    if not any(map(found.has, ("torch_tpu", "torch_xla", "libtpu"))):
        return ()
    told = (rule(found) for rule in _RULES)
    return tuple(problem for problem in told if problem is not None)


def blocking(use: Use, found: Installation | None = None) -> Skip | None:
    """Return why a use cannot work here, the first reason with its fix; `None` where nothing is known against it.

    Args:
        use: What is wanted.
        found: The installation; this process's by default.
    """
    found = installation() if found is None else found
    rules: Iterable[Callable[[Installation], Problem | None]] = (
        *(_missing(name, use) for name in _NEEDS[use]),
        *_RULES,
    )
    for rule in rules:
        problem = rule(found)
        if problem is not None and use in problem.blocks:
            return problem.skip
    return None


_NEEDS: Mapping[Use, tuple[str, ...]] = {
    Use.TORCH_TPU: ("torch_tpu", "libtpu"),
    Use.EMULATION: ("torch_tpu", PLUGIN),
    Use.TORCH_XLA: ("torch_xla",),
    Use.AHEAD_OF_TIME: ("torch_tpu", "libtpu", "jax"),
}


def _missing(name: str, use: Use) -> Callable[[Installation], Problem | None]:
    """Return the rule that a distribution must be there."""

    def rule(found: Installation) -> Problem | None:
        if found.has(name):
            return None
        reason = f"{name} is not installed"
        return Problem(f"{name}-missing", reason, _install(name), frozenset({use}))

    return rule


def _install(*names: str) -> str:
    """Return the command that installs the tested versions, and nothing beside them where that would break others."""
    alone = {"libtpu", PLUGIN, "torch_xla"} & set(names)
    if "torch_xla" in names:
        return (
            "in an environment of its own: pip install --no-deps torch==2.9.1 "
            f"torch_xla=={PINS['torch_xla']} (make test-tpu builds one)"
        )
    pinned = " ".join(f"{name}=={PINS[name]}" for name in names)
    return f"pip install {'--no-deps ' if alone else ''}{pinned}"


def _libtpu_version(found: Installation) -> Problem | None:
    version = found.versions.get("libtpu", "")
    if not found.has("torch_tpu") or not version or len(_numbers(version)) <= 3:
        return None
    return Problem(
        "libtpu-version",
        f"libtpu {version} has a version of four parts, which torch_tpu refuses (set_libtpu_version() expects "
        "<major>[.<minor>[.<patch>]])",
        _install("libtpu"),
        frozenset({Use.TORCH_TPU, Use.EMULATION, Use.AHEAD_OF_TIME}),
    )


def _torch_for_torch_tpu(found: Installation) -> Problem | None:
    torch = found.versions.get("torch", "")
    low, high = _TORCH_FOR_TORCH_TPU
    if not found.has("torch_tpu") or not torch or low <= _numbers(torch)[:2] <= high:
        return None
    return Problem(
        "torch-tpu-torch",
        f"torch_tpu {found.versions['torch_tpu']} is built for torch {_dotted(low)} to {_dotted(high)}, and torch is "
        f"{torch}",
        _install("torch"),
        frozenset({Use.TORCH_TPU, Use.EMULATION, Use.AHEAD_OF_TIME}),
    )


def _torch_for_torch_xla(found: Installation) -> Problem | None:
    torch, torch_xla = found.versions.get("torch", ""), found.versions.get("torch_xla", "")
    if not torch or not torch_xla or _numbers(torch)[:2] == _numbers(torch_xla)[:2]:
        return None
    ours = _dotted(_numbers(torch_xla)[:2])
    return Problem(
        "torch-xla-torch",
        f"torch_xla {torch_xla} is built against torch {ours} and does not load with torch {torch} (undefined symbols)",
        _install("torch_xla"),
        frozenset({Use.TORCH_XLA}),
    )


def _two_runtimes(found: Installation) -> Problem | None:
    loaded = sorted(found.loaded & _RUNTIMES)
    if len(loaded) < 2 or "torch_tpu" not in loaded:
        return None
    others = {"torchax": Use.AHEAD_OF_TIME, "torch_xla": Use.TORCH_XLA}
    return Problem(
        "two-runtimes",
        f"this process holds {' and '.join(loaded)}: each registers its device with torch, which takes one "
        "(register_privateuse1_backend() has already been set)",
        "run them in processes of their own, with TORCH_DEVICE_BACKEND_AUTOLOAD=0 in those without torch_tpu",
        frozenset({Use.TORCH_TPU, Use.EMULATION, *(others[name] for name in loaded if name in others)}),
    )


def _lock(found: Installation) -> Problem | None:
    if not found.lock_holder or not found.has("libtpu") or _on(found, "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        return None
    return Problem(
        "libtpu-lock",
        f"process {found.lock_holder} holds libtpu's lock ({_LOCK}); a second one is aborted",
        f"to compile ahead of time: export ALLOW_MULTIPLE_LIBTPU_LOAD=1; to use the chip: end process "
        f"{found.lock_holder} first",
        frozenset({Use.TORCH_TPU, Use.AHEAD_OF_TIME}),
    )


def _autoload(found: Installation) -> Problem | None:
    if not found.has("torch_tpu") or found.environment.get(_AUTOLOAD) == "0":
        return None
    return Problem(
        "autoload",
        "every `import torch` loads torch_tpu too, in programs that use no TPU as well: it takes longer, and "
        "torch.compile is replaced",
        "export TORCH_DEVICE_BACKEND_AUTOLOAD=0 (kpt sets it for itself and loads torch_tpu where it is used)",
    )


def _compiler(found: Installation) -> Problem | None:
    if not found.has(PLUGIN) or "gcc" in found.tools:
        return None
    return Problem(
        "gcc-missing",
        f"gcc is not installed: it builds the adapter between torch_tpu and {PLUGIN}",
        "apt-get install gcc",
        frozenset({Use.EMULATION}),
    )


def _libtpu_for_jax(found: Installation) -> Problem | None:
    """Compiled programs come back as HLO text through jaxlib, whose parser must know what libtpu writes."""
    libtpu, paired = found.versions.get("libtpu", ""), found.jax_libtpu
    if not found.has("jaxlib") or not libtpu or not paired or _numbers(libtpu)[:3] <= _numbers(paired)[:3]:
        return None
    return Problem(
        "jaxlib-older",
        f"jaxlib {found.versions['jaxlib']} goes with libtpu {paired} and is older than libtpu {libtpu}: programs "
        "compiled for TPU7x may fail to be read back (async-update instruction); v2 to v6e are read",
        "for TPU7x only: an environment with Python 3.12 and a newer jax; nothing to do for the others",
    )


def _library_path(found: Installation) -> Problem | None:
    path = found.environment.get("TPU_LIBRARY_PATH", "")
    if not path or Path(path).exists():
        return None
    return Problem(
        "library-path",
        f"TPU_LIBRARY_PATH names {path}, which is not there",
        "unset TPU_LIBRARY_PATH",
        frozenset({Use.TORCH_TPU, Use.AHEAD_OF_TIME}),
    )


_RULES: tuple[Callable[[Installation], Problem | None], ...] = (
    _torch_for_torch_tpu,
    _torch_for_torch_xla,
    _libtpu_version,
    _two_runtimes,
    _library_path,
    _lock,
    _compiler,
    _libtpu_for_jax,
    _autoload,
)


def _numbers(version: str) -> tuple[int, ...]:
    """Return the release's numbers: (2, 13, 0) of `2.13.0+cpu`, (0, 0, 42) of `0.0.42.*`."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, release[0].split("."))) if release else ()


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _on(found: Installation, variable: str) -> bool:
    return found.environment.get(variable, "").lower() in ("1", "true", "yes")


def _as_started(variable: str) -> str:
    """Return a variable as this process was started with; as it is now where the kernel does not tell."""
    try:
        began = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return os.environ.get(variable, "")
    prefix = f"{variable}=".encode()
    return next((entry[len(prefix) :].decode() for entry in began if entry.startswith(prefix)), "")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _requirements(name: str) -> list[str]:
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _jax_libtpu(requirements: Iterable[str]) -> str:
    """Return the release of libtpu that jax's extra `tpu` asks for."""
    for requirement in requirements:
        if pinned := re.match(r"libtpu\s*==\s*([\d.*]+)", requirement):
            return pinned[1]
    return ""


def _lock_holder(lock: Path, table: Path, own: int) -> int:
    """Return the process that holds libtpu's lock, 0 for none but `own`.

    From the kernel's table of locks: opening the file and closing it again would drop a lock of this very process.
    """
    try:
        inode, text = lock.stat().st_ino, table.read_text(encoding="utf-8")
    except OSError:
        return 0
    for line in text.splitlines():
        fields = line.split()
        if len(fields) >= 6 and fields[1] in ("POSIX", "FLOCK", "OFDLCK") and fields[5].endswith(f":{inode}"):
            holder = int(fields[4])
            if holder not in (own, -1):
                return holder
    return 0
