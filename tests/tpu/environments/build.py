"""Build the environment of one TPU runtime: `.venv-tpu` for TorchTPU, `.venv-xla` for PyTorch/XLA.

    python tests/tpu/environments/build.py torch_tpu .venv-tpu
    python tests/tpu/environments/build.py torch_xla .venv-xla

Two, since they need different releases of torch. An environment that was built from the same files is left as it is.
Exits with 0, with 1 where something is wrong, and with 75 where a package could not be downloaded.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

__all__ = ["UNAVAILABLE", "Unavailable", "build", "is_unavailable"]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
UNAVAILABLE = 75
"""Exit code of a download that failed: `EX_TEMPFAIL`, for it may work another time."""

FILES = {
    "torch_tpu": ("torch_tpu.txt", "plugin.txt"),
    "torch_xla": ("torch_xla.txt", "torch_xla_needs.txt", "stub_cuda.py"),
}
PROJECT_NEEDS = ("pydantic", "scipy", "click", "rich", "jinja2", "cloudpickle", "psutil")
"""The package's requirements but torch, which has its own line."""

_NO_DOWNLOAD = re.compile(
    r"No matching distribution found|Could not fetch URL|Max retries exceeded|Connection(Error| broken| refused|"
    r" aborted| reset)|Read timed out|ReadTimeoutError|Temporary failure in name resolution|Name or service not known|"
    r"Network is unreachable|HTTP error 40[34]|HTTP error 5\d\d|ProxyError|SSLError"
)


class Unavailable(RuntimeError):
    """A package could not be downloaded."""


def is_unavailable(output: str) -> bool:
    """Return whether pip's output says that a download failed; a wrong hash or version conflict is no such thing."""
    if "DO NOT MATCH THE HASHES" in output or "ResolutionImpossible" in output:
        return False
    return _NO_DOWNLOAD.search(output) is not None


def build(runtime: str, directory: Path) -> None:
    """Build the environment of a runtime, unless it is there and of the same files.

    Raises:
        Unavailable: A package could not be downloaded, with pip's words.
        subprocess.CalledProcessError: Anything else went wrong.
    """
    stamp, want = directory / ".built", _fingerprint(runtime)
    if stamp.exists() and stamp.read_text(encoding="utf-8") == want:
        return
    stamp.unlink(missing_ok=True)
    if not (directory / "bin" / "python").exists():
        venv.create(directory, with_pip=True)
    if runtime == "torch_tpu":
        _pip(directory, "-r", str(HERE / "torch_tpu.txt"), *PROJECT_NEEDS, "-c", str(ROOT / "constraints.txt"))
        _pip(directory, "--no-deps", "--require-hashes", "-r", str(HERE / "plugin.txt"))
    else:
        constraints = [line for line in _lines(ROOT / "constraints.txt") if not line.startswith(("torch", "triton"))]
        limits = directory / "constraints.txt"
        limits.write_text("\n".join(constraints) + "\n", encoding="utf-8")
        _pip(directory, "-r", str(HERE / "torch_xla_needs.txt"), *PROJECT_NEEDS, "-c", str(limits))
        _pip(directory, "--no-deps", "-r", str(HERE / "torch_xla.txt"))
        subprocess.run([str(directory / "bin" / "python"), str(HERE / "stub_cuda.py")], check=True)
    _pip(directory, "--no-deps", "-e", str(ROOT))
    stamp.write_text(want, encoding="utf-8")


def _pip(directory: Path, *arguments: str) -> None:
    extra = os.environ.get("PIP_ARGS", "").split()
    command = [str(directory / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", *extra]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    said = done.stdout + done.stderr
    sys.stderr.write(said)
    if is_unavailable(said):
        errors = [line for line in said.splitlines() if line.startswith("ERROR")] or said.splitlines()
        raise Unavailable(errors[-1])
    raise subprocess.CalledProcessError(done.returncode, [*command, *arguments])


def _fingerprint(runtime: str) -> str:
    read = hashlib.sha256()
    for path in (*(HERE / name for name in FILES[runtime]), HERE / "build.py", ROOT / "constraints.txt"):
        read.update(path.read_bytes())
    return f"{sys.version_info[0]}.{sys.version_info[1]} {read.hexdigest()}\n"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtime", choices=sorted(FILES))
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    try:
        build(arguments.runtime, arguments.directory.resolve())
    except Unavailable as error:
        sys.stderr.write(f"build: {error}\n")
        return UNAVAILABLE
    except (subprocess.CalledProcessError, OSError) as error:
        sys.stderr.write(f"build: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
