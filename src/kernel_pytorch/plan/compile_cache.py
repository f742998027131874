"""What `torch.compile` generated for a plan, carried in the plan's `artifacts/`: a new process does not compile again.

Two parts. Torch's own cache artifacts (`torch.compiler.save_cache_artifacts`: FX graphs, AOTAutograd, autotuning,
Triton binaries), and the shared objects that Inductor built with the C++ compiler, which torch leaves out: on a CPU
they are most of the time (measured, four small blocks, torch 2.13: first call 10.9 s cold, 8.5 s with torch's
artifacts alone, 3.2 s with both).

All of it is code, so it is loaded only where the user trusts it, and only where device, host and software are those
that it was made for. Loading fills Inductor's cache directory; what torch looks up there it finds by its own keys.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from kernel_pytorch.core.types import DeviceSpec, Skip
from kernel_pytorch.errors import OutputDirectoryError, PlanError
from kernel_pytorch.hardware.cpu.probe import cpu_features, cpu_name
from kernel_pytorch.plan.store import write_text

__all__ = ["discard", "identity", "load", "present", "recording", "save"]

VERSION = 1
_ARCHIVE = "compile_cache.zip"
_FACTS = "compile_cache.json"
_TORCH = "torch_artifacts.bin"
_NATIVE = "native/"
_SOFTWARE = ("torch", "triton", "python", "compiler", "driver", "cuda", "rocm", "oneapi", "mig")
_MAPS = Path("/proc/self/maps")
_LARGEST_CHECK_BYTES = 64 << 10


def identity(device: DeviceSpec) -> dict[str, str]:
    """Return what compiled code depends on: device, host CPU (objects are built for it), and software versions."""
    software = {name: device.software[name] for name in _SOFTWARE if name in device.software}
    return {"device": device.key, "host": f"{cpu_name()} ({' '.join(cpu_features())})", **software}


def save(directory: Path, device: DeviceSpec) -> Skip | None:
    """Write what this process has compiled into a plan's `artifacts/`; must be called in the process that compiled.

    Args:
        directory: The `artifacts/` directory of the plan; created where needed.
        device: What it was compiled on.

    Returns:
        Why there was nothing to write; `None` where it was written.

    Raises:
        OutputDirectoryError: The directory cannot be written.
    """
    disabled = _disabled()
    if disabled is not None:
        return disabled
    saved = torch.compiler.save_cache_artifacts()
    native = _native_objects()
    if saved is None and not native:
        return Skip("nothing was compiled by torch.compile, or torch could cache none of it")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=f".{_ARCHIVE}.", delete=False) as file:
            temporary = Path(file.name)
        try:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                if saved is not None:
                    archive.writestr(_TORCH, saved[0])
                for name, path in native.items():
                    archive.write(path, _NATIVE + name)
            facts = {
                "version": VERSION,
                "made_for": identity(device),
                "sha256": _digest(temporary),
                "bytes": temporary.stat().st_size,
                "torch_artifacts": {kind: len(keys) for kind, keys in saved[1].artifacts.items()} if saved else {},
                "native_objects": len(native),
            }
            discard(directory)  # never the old facts beside the new archive
            temporary.chmod(0o644)
            temporary.replace(directory / _ARCHIVE)
        finally:
            temporary.unlink(missing_ok=True)
        write_text(directory / _FACTS, json.dumps(facts, indent=1) + "\n")
    except OSError as error:
        raise OutputDirectoryError(
            f"cannot write the compile cache to {directory}: {error.strerror or error}",
            fix="choose another directory with -o DIR",
        ) from error
    return None


@contextmanager
def recording(directory: Path, device: DeviceSpec) -> Iterator[None]:
    """Save what is compiled inside, and nothing that was compiled before; nothing is saved where it raises.

    What was saved there before goes first: it is of another choice.

    Raises:
        OutputDirectoryError: The directory cannot be written.
    """
    if present(directory):
        discard(directory)
    fresh = _fresh_record()
    if fresh is None:  # another torch: what was compiled before is saved too
        yield
        save(directory, device)
        return
    with fresh():
        yield
        save(directory, device)


def discard(directory: Path) -> None:
    """Remove a compile cache, which another choice has made useless; none there is fine."""
    (directory / _FACTS).unlink(missing_ok=True)
    (directory / _ARCHIVE).unlink(missing_ok=True)


def present(directory: Path) -> bool:
    """Return whether a plan's `artifacts/` hold a compile cache."""
    return (directory / _FACTS).is_file()


def load(directory: Path, device: DeviceSpec, *, trust: bool) -> Skip | None:
    """Put a plan's compiled code where torch finds it; call it before the first call of the compiled model.

    Args:
        directory: The `artifacts/` directory of the plan.
        device: The device of this process.
        trust: Whether the user trusts code in this directory.

    Returns:
        Why nothing was loaded: there is none, it is not trusted, or it was made for something else. `None` where it
        was loaded.

    Raises:
        PlanError: It is corrupted.
    """
    facts_path, archive_path = directory / _FACTS, directory / _ARCHIVE
    if not present(directory):
        return Skip(f"there is no compile cache in {directory}", "run `kpt optimize` for it")
    if not trust:
        return Skip("the plan's compile cache is code and is not trusted", "trust_artifacts=True, --trust-artifacts")
    facts = _read_facts(facts_path)
    differing = _differing(facts["made_for"], identity(device))
    if differing:
        return Skip(f"the plan's compile cache is for {differing}", "run `kpt optimize` here")
    disabled = _disabled()
    if disabled is not None:
        return disabled
    files = _read_archive(archive_path, facts["sha256"])
    artifacts = files.pop(_TORCH, None)
    try:
        for name, content in files.items():
            _place(content, _cache_root() / name.removeprefix(_NATIVE))
        loaded = artifacts is None or torch.compiler.load_cache_artifacts(artifacts) is not None
    except OSError as error:
        return Skip(f"Inductor's cache directory cannot be written: {error}", "set TORCHINDUCTOR_CACHE_DIR to one")
    if not loaded:
        raise _corrupted(archive_path, "torch cannot read its artifacts")
    return None


def _read_archive(path: Path, sha256: str) -> dict[str, bytes]:
    try:
        if _digest(path) != sha256:
            raise _corrupted(path, "its digest is not the one written beside it")
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise _corrupted(path, str(error)) from error
    for name in files:
        inside = PurePosixPath(name.removeprefix(_NATIVE))
        if name != _TORCH and (not name.startswith(_NATIVE) or inside.is_absolute() or ".." in inside.parts):
            raise _corrupted(path, f"it has a file that has no place in the cache, {name}")
    return files


def _place(content: bytes, target: Path) -> None:
    """Write a file atomically, unless it is there: names hold a digest of what made the file."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
        file.write(content)
    Path(file.name).chmod(0o755)
    Path(file.name).replace(target)


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _corrupted(path, str(error)) from error
    if not isinstance(facts, dict) or not isinstance(facts.get("made_for"), dict) or "sha256" not in facts:
        raise _corrupted(path, "fields are missing")
    return {**facts, "made_for": {**facts["made_for"], "format": str(facts.get("version"))}}


def _differing(made: Mapping[str, Any], here: Mapping[str, str]) -> str:
    wanted = {**here, "format": str(VERSION)}
    differing = [k for k in sorted({*made, *wanted}) if made.get(k) != wanted.get(k)]
    return "; ".join(f"{k} {made.get(k, 'unknown')}, here is {wanted.get(k, 'none')}" for k in differing)


def _corrupted(path: Path, why: str) -> PlanError:
    return PlanError(
        f"the compile cache {path} is corrupted: {why}",
        fix=f"delete {path.with_name(_FACTS)}, or run `kpt optimize` again",
    )


def _disabled() -> Skip | None:
    """Return why torch would neither record nor find anything, which is the user's own choice."""
    if not hasattr(torch.compiler, "save_cache_artifacts"):
        return Skip(f"torch {torch.__version__} has no portable compile cache", "pip install --upgrade torch")
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    if getattr(inductor, "force_disable_caches", False) or not getattr(inductor, "fx_graph_cache", True):
        return Skip(
            "Inductor's caches are disabled in this process",
            "unset TORCHINDUCTOR_FORCE_DISABLE_CACHES and TORCHINDUCTOR_FX_GRAPH_CACHE",
        )
    if not getattr(functorch, "enable_autograd_cache", True):
        return Skip("the AOTAutograd cache is disabled in this process", "unset TORCHINDUCTOR_AUTOGRAD_CACHE")
    return None


def _fresh_record() -> Callable[[], AbstractContextManager[None]] | None:
    """Return torch's context in which it records artifacts apart from those before; it has no public name."""
    try:
        private = importlib.import_module("torch.compiler._cache")
    except ImportError:
        return None
    return getattr(getattr(private, "CacheArtifactManager", None), "with_fresh_cache", None)


def _cache_root() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()).resolve()


def _native_objects() -> dict[str, Path]:
    """Return the shared objects in Inductor's cache that a process like this one loads, by path relative to it.

    Those that this process has mapped; with them Inductor's checks of the instruction set, `X.so` beside `X.cpp`
    (kernels are `X.main.cpp`), which load in a process of their own: four compilations, 5 s of a first call (measured).
    """
    root = _cache_root()
    if not _MAPS.exists():  # not Linux: torch's artifacts alone
        return {}
    mapped = {line.split(maxsplit=5)[-1] for line in _MAPS.read_text(encoding="utf-8").splitlines()}
    found = {Path(p) for p in mapped if p.startswith(f"{root}{os.sep}") and p.endswith(".so")}
    found = {p for p in found if p.is_file()}
    if found:
        checks = (p.with_suffix(".so") for p in root.glob("*/*.cpp") if p.stem.isalnum())
        found |= {p for p in checks if p.is_file() and p.stat().st_size <= _LARGEST_CHECK_BYTES}
    return {p.relative_to(root).as_posix(): p for p in sorted(found)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
