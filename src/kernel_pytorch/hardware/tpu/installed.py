"""Which software runs PyTorch on a TPU here: read from what is installed, without importing any of it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from kernel_pytorch.core.types import Skip

__all__ = ["EMULATED", "RUNTIMES", "Installed", "emulated", "plugin", "runtime"]

EMULATED = "emulated on the CPU: times mean nothing"
"""What every output and plan says of a run without a chip."""

RUNTIMES: dict[str, str] = {"torch_tpu": "torch-tpu", "torch_xla": "torch-xla"}
"""Runtimes by name, the preferred one first, and the distribution each comes in."""

_INSTALL = "pip install torch-tpu==0.2.0 (needs torch 2.11 to 2.15 and Python 3.11 or later)"
_PLUGINS = ("fastatomstruct_xla_cpu",)


@dataclass(frozen=True, slots=True)
class Installed:
    """A runtime that is installed.

    Attributes:
        name: `torch_tpu` or `torch_xla`.
        version: Of its distribution.
        emulated: Whether it is to run on the CPU.
    """

    name: str
    version: str
    emulated: bool

    @property
    def label(self) -> str:
        """What plans store: `torch_tpu 0.2.0`, and that it is emulated where it is."""
        return f"{self.name} {self.version}" + (f" ({EMULATED})" if self.emulated else "")


def emulated() -> bool:
    """Return whether the user asked for a TPU emulated on the CPU, by `KPT_TPU_EMULATE=1`."""
    return os.environ.get("KPT_TPU_EMULATE", "") == "1"


def version_of(distribution: str) -> str:
    """Return the installed version of a distribution; empty where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def runtime() -> Installed | Skip:
    """Return the runtime in use: `KPT_TPU_RUNTIME` names it, else TorchTPU comes before PyTorch/XLA."""
    wanted = os.environ.get("KPT_TPU_RUNTIME", "")
    if wanted and wanted not in RUNTIMES:
        return Skip(f"KPT_TPU_RUNTIME={wanted!r} is no runtime", f"one of {', '.join(RUNTIMES)}")
    for name in (wanted,) if wanted else tuple(RUNTIMES):
        if version := version_of(RUNTIMES[name]):
            return Installed(name, version, emulated())
    what = f"{wanted} is not installed" if wanted else f"none of {', '.join(RUNTIMES)} is installed"
    return Skip(f"PyTorch cannot run on a TPU here: {what}", _INSTALL)


def plugin() -> Path | Skip:
    """Return the PJRT CPU plugin that stands for the chip under emulation of TorchTPU.

    `KPT_TPU_PJRT_PLUGIN` names a file; else it is the one of a package that this was tested with.
    """
    if named := os.environ.get("KPT_TPU_PJRT_PLUGIN", ""):
        path = Path(named)
        return path if path.is_file() else Skip(f"KPT_TPU_PJRT_PLUGIN={named!r} is not a file")
    for package in _PLUGINS:
        found = importlib.util.find_spec(package)
        for place in (found.submodule_search_locations or ()) if found else ():
            if libraries := sorted(Path(place).glob("*pjrt*cpu*.so")):
                return libraries[0]
    return Skip(
        "no PJRT CPU plugin is installed, which stands for the chip under emulation",
        "pip install --no-deps fastatomstruct-xla-cpu==2026.6.23",
    )
