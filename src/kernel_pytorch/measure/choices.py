"""Choices that were measured once, kept in files for the next process: one file a machine and its software."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["cache_directory", "choice_file", "load_choices", "store_choices"]

_log = logging.getLogger(__name__)


def cache_directory() -> Path:
    """Return where choices are kept: `$KERNEL_PYTORCH_CACHE`, or `kernel_pytorch` in the platform's cache directory."""
    named = os.environ.get("KERNEL_PYTORCH_CACHE")
    if named:
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "kernel_pytorch"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kernel_pytorch"


def choice_file(what: str, device_key: str, software: Mapping[str, str]) -> Path:
    """Return the file of one kind of choice on one device with these versions: another version is measured anew."""
    digest = hashlib.sha256(json.dumps(dict(software), sort_keys=True).encode()).hexdigest()[:12]
    return cache_directory() / what / f"{device_key}-{digest}.json"


def load_choices(path: Path, *, version: int = 1) -> dict[str, Any]:
    """Return the choices of a file by name; none where it is absent, damaged (logged) or of another version."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return dict(stored["choices"]) if stored["version"] == version else {}
    except OSError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        _log.warning("%s is damaged (%s): what it held is measured again", path, error)
        return {}


def store_choices(path: Path, choices: Mapping[str, Any], software: Mapping[str, str], *, version: int = 1) -> None:
    """Add choices to a file, which readers see before or after, never between; log where that is impossible.

    Args:
        path: The file: `choice_file`.
        choices: By name, as JSON can hold them; what the file has under the same names is replaced.
        software: Versions that decided, for whoever reads the file.
        version: Of the form in which these choices are written; what the file has in another is dropped.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            merged = {**load_choices(path, version=version), **choices}
            content = {"version": version, "software": dict(software), "choices": dict(sorted(merged.items()))}
            _replace(path, json.dumps(content, indent=1, allow_nan=False))
    except OSError as error:
        _log.warning("cannot keep what was measured in %s (%s): it is measured again next time", path, error)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise
