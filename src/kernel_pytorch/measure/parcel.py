"""Packs an object into a file that workers map, so that ten workers hold one copy of the weights."""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, SimpleNamespace
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


def _importable(module: str) -> bool:
    """Return whether a fresh process would find a module, rather than only this one that has made it."""
    top = module.partition(".")[0]
    return any(f.find_spec(top, None) is not None for f in sys.meta_path if hasattr(f, "find_spec"))


@contextmanager
def _pickling() -> Iterator[Any]:
    """Yield a pickle module for `torch.save`: cloudpickle, strict where tensors would lose something silently.

    Classes and functions of modules that exist only in this process travel by value.
    """
    import cloudpickle  # type: ignore[import-untyped,unused-ignore]
    import torch

    known: dict[str, bool] = {}

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc,unused-ignore]
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, torch.Tensor):
                if obj._backward_hooks or getattr(obj, "_post_accumulate_grad_hooks", None):  # noqa: SLF001
                    raise TravelError(f"a tensor of shape {tuple(obj.shape)} has gradient hooks, which would be lost")
            elif isinstance(obj, type | FunctionType):
                name = getattr(obj, "__module__", None) or ""
                if name in sys.modules and name != "__main__" and name not in known:
                    known[name] = _importable(name)
                    if not known[name]:
                        cloudpickle.register_pickle_by_value(sys.modules[name])
            return super().reducer_override(obj)

    try:
        yield SimpleNamespace(__name__="cloudpickle", Pickler=Pickler, dumps=cloudpickle.dumps)
    finally:
        for name, importable in known.items():
            if not importable:
                cloudpickle.unregister_pickle_by_value(sys.modules[name])


def pack(obj: Any, directory: Path | None = None) -> Path:
    """Write an object so that workers can map it: `torch.save` over cloudpickle.

    Args:
        obj: Anything that cloudpickle takes: modules, workloads, lambdas, classes of `__main__`. Gradients
            (`.grad`) stay behind.
        directory: A private directory (mode 0700); by default one of this process, removed at exit.

    Returns:
        The file, of mode 0600.

    Raises:
        TravelError: The object cannot travel (it holds a lock, a generator, tensors with gradient hooks, a
            parametrized module ...), or the directory is not private.
    """
    import torch

    directory = _scratch() if directory is None else directory
    _check_private(directory)
    handle, name = tempfile.mkstemp(suffix=".pt", dir=directory)
    try:
        with os.fdopen(handle, "wb") as file, _pickling() as pickling:
            torch.save(obj, file, pickle_module=pickling, pickle_protocol=5)
    except Exception as error:
        Path(name).unlink()
        kind = "" if isinstance(error, TravelError) else f"{type(error).__name__}: "
        why = (str(error).strip().splitlines() or ["no message"])[0]
        raise TravelError(f"{type(obj).__name__} cannot travel to a worker: {kind}{why}") from error
    return Path(name)


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
