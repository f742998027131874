"""Packs an object into a file that workers map, so that ten workers hold one copy of the weights."""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

from kernel_pytorch.errors import KptError

__all__ = ["TravelError", "pack", "unpack"]


class TravelError(KptError):
    """An object cannot reach a worker, or a file is not safe to unpack; the message names the reason."""


_SCRATCH: list[Path] = []


def _scratch() -> Path:
    """Return this process's own directory for packed objects; made once, removed at exit."""
    if not _SCRATCH:
        path = Path(tempfile.mkdtemp(prefix="kernel-pytorch-"))
        owner = os.getpid()
        atexit.register(lambda: shutil.rmtree(path, ignore_errors=True) if os.getpid() == owner else None)
        _SCRATCH.append(path)
    return _SCRATCH[0]


def _check_private(directory: Path) -> None:
    """Refuse a directory that anyone else could have written to: what is unpacked from it is code."""
    info = os.lstat(directory)
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o077:
        raise TravelError(
            f"{directory} is not a directory of mode 0700 that belongs to this user",
            fix=f"chmod 700 {directory}",
        )


def pack(obj: Any, directory: Path | None = None) -> Path:
    """Write an object so that workers can map it: `torch.save` over cloudpickle, tensors page-aligned beside it.

    Args:
        obj: Anything that cloudpickle takes: modules, workloads, lambdas, classes of `__main__`.
        directory: A private directory (mode 0700); by default one of this process, removed at exit.

    Returns:
        The file, of mode 0600.

    Raises:
        TravelError: The object cannot travel (it holds an open file, a lock ...), or the directory is not private.
    """
    import cloudpickle  # type: ignore[import-untyped,unused-ignore]
    import torch

    directory = _scratch() if directory is None else directory
    _check_private(directory)
    handle, name = tempfile.mkstemp(suffix=".pt", dir=directory)
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(obj, file, pickle_module=cloudpickle, pickle_protocol=5)
    except Exception as error:
        path.unlink()
        raise TravelError(f"{type(obj).__name__} cannot travel to a worker: {type(error).__name__}: {error}") from error
    return path


def unpack(path: Path) -> Any:
    """Read what `pack` wrote; tensors are mapped, so that workers share their pages until one writes.

    Raises:
        TravelError: The file or its directory does not belong to this user alone.
    """
    import torch

    path = Path(path)
    _check_private(path.parent)
    info = os.lstat(path)
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
        raise TravelError(f"{path} is not a file of this user")
    return torch.load(path, mmap=True, weights_only=False)
