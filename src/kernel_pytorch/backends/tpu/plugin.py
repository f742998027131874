"""The PJRT plugin that stands for a TPU under emulation: a CPU plugin from a package, behind a shim built here.

Neither is part of this package. The plugin is the user's to install, and is held against the hash of the one that this
was tested with; the shim is compiled from `pjrt_shim.c` on first use, into the user's cache directory.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from kernel_pytorch.core.types import Skip
from kernel_pytorch.errors import KptError
from kernel_pytorch.hardware.cpu.specs import cache_directory
from kernel_pytorch.hardware.tpu import installed

__all__ = ["SHIM_SOURCE", "TESTED", "build_shim", "environment", "tested_plugin"]

SHIM_SOURCE = Path(__file__).with_name("pjrt_shim.c")

TESTED = {"0a0fe56ca17be9efc7b942e89e534e5e0ad4a0f1e369b66d27b62184509015b9": "fastatomstruct-xla-cpu 2026.6.23"}
"""SHA-256 of the plugins that the tests ran with, and the packages they come in."""


def environment() -> dict[str, str]:
    """Return the variables that make `torch_tpu` load the CPU plugin instead of `libtpu`; set before its import.

    Raises:
        KptError: No plugin that may be used, or no C compiler for the shim.
    """
    return {
        "KPT_PJRT_REAL": str(tested_plugin()),
        "TPU_LIBRARY_PATH": str(build_shim()),
        "TPU_SKIP_MDS_QUERY": "1",  # else libtpu asks the network which machine this is
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
    }


def tested_plugin() -> Path:
    """Return the CPU plugin: the one that `KPT_TPU_PJRT_PLUGIN` names, or one of known content.

    Raises:
        KptError: There is none, or one of a package with other content than was tested.
    """
    path = installed.plugin()
    if isinstance(path, Skip):
        raise KptError(path.reason, fix=path.fix)
    if os.environ.get("KPT_TPU_PJRT_PLUGIN"):
        return path
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found not in TESTED:
        raise KptError(
            f"{path} has SHA-256 {found[:12]}..., which is none that this was tested with",
            fix=f"install {' or '.join(TESTED.values())}, or name the file in KPT_TPU_PJRT_PLUGIN to use it anyway",
        )
    return path


def build_shim(directory: Path | None = None) -> Path:
    """Return the shim, compiled where its source has changed or it has not been built yet.

    Args:
        directory: Where it is kept; the user's cache directory by default.

    Raises:
        KptError: There is no C compiler, or it refuses the source.
    """
    source = SHIM_SOURCE.read_bytes()
    directory = cache_directory() if directory is None else directory
    library = directory / f"pjrt_shim-{hashlib.sha256(source).hexdigest()[:16]}.so"
    if library.exists():
        return library
    compiler = shutil.which(os.environ.get("CC", "") or "gcc") or shutil.which("cc")
    if compiler is None:
        raise KptError("emulating a TPU needs a C compiler and none was found", fix="apt-get install gcc")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        built = Path(scratch, library.name)
        command = [compiler, "-shared", "-fPIC", "-O2", "-std=gnu11", "-o", str(built), str(SHIM_SOURCE), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
            raise KptError(f"{compiler} cannot build {SHIM_SOURCE.name}: {lines[0]}", fix="apt-get install gcc")
        os.replace(built, library)  # noqa: PTH105  two processes may build it at once
    return library
