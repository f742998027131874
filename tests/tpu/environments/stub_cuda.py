"""Make a CUDA build of torch importable on a machine without CUDA, without downloading gigabytes of its libraries.

PyTorch/XLA 2.9 is built against torch 2.9, of which the package index has CUDA builds only. Its shared objects name
the CUDA libraries they need, so the loader wants them even where no GPU is ever touched. For each one this writes a
small library of the same name (SONAME) with the symbol versions that torch asks for, whose functions return
`cudaErrorNoDevice`: torch then says that CUDA is not available and everything on the CPU works. For test environments
only: nothing here may be deployed.

    python stub_cuda.py            writes into the running interpreter's torch/lib; needs gcc and readelf
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Needs", "needs_of", "parse_needs", "write_stub"]

NO_DEVICE = 100
"""`cudaErrorNoDevice`."""

CUDA_LIBRARY = re.compile(r"^lib(cu|nv|nccl)[A-Za-z0-9_]*\.so\.\d+$")
CUDA_SYMBOL = re.compile(r"^(__cuda|cu|nv|nccl)")

SPECIAL = {
    # Called while torch's libraries load, for every kernel in them: they must succeed.
    "__cudaRegisterFatBinary": "void *__cudaRegisterFatBinary(void *image) { static void *handle[8]; return handle; }",
    "__cudaRegisterFatBinaryEnd": "void __cudaRegisterFatBinaryEnd(void) {}",
    "__cudaUnregisterFatBinary": "void __cudaUnregisterFatBinary(void) {}",
    "__cudaRegisterFunction": "void __cudaRegisterFunction(void) {}",
    "__cudaRegisterVar": "void __cudaRegisterVar(void) {}",
    "__cudaInitModule": "char __cudaInitModule(void *handle) { return 0; }",
    # Asked by torch.cuda.is_available() and whatever tells about errors.
    "cudaGetDeviceCount": f"int cudaGetDeviceCount(int *count) {{ *count = 0; return {NO_DEVICE}; }}",
    "cudaGetLastError": "int cudaGetLastError(void) { return 0; }",
    "cudaGetErrorString": 'const char *cudaGetErrorString(int error) { return "stub library: no CUDA device"; }',
    "cudaGetErrorName": 'const char *cudaGetErrorName(int error) { return "cudaErrorNoDevice"; }',
    "cudnnGetProperty": (
        "int cudnnGetProperty(int part, int *value) { *value = part == 0 ? 9 : part == 1 ? 10 : 2; return 0; }"
    ),
    "cudaDriverGetVersion": "int cudaDriverGetVersion(int *version) { *version = 0; return 0; }",
    "cudaRuntimeGetVersion": "int cudaRuntimeGetVersion(int *version) { *version = 12080; return 0; }",
}


@dataclass
class Needs:
    """What some shared objects want of CUDA.

    Attributes:
        libraries: SONAMEs.
        versions: The library that each symbol version belongs to.
        symbols: Undefined symbols by library and symbol version; `""` for those without one.
    """

    libraries: set[str] = field(default_factory=set)
    versions: dict[str, str] = field(default_factory=dict)
    symbols: dict[tuple[str, str], set[str]] = field(default_factory=lambda: defaultdict(set))


def needs_of(objects: Iterable[Path]) -> Needs:
    """Return what shared objects want of CUDA together; what one of them defines for another is not wanted."""
    texts = [_readelf("-W", "-d", "-V", "--dyn-syms", str(path)) for path in objects]
    return parse_needs(texts)


def parse_needs(texts: Iterable[str]) -> Needs:
    """Return what the output of `readelf -W -d -V --dyn-syms` of some objects says that they want of CUDA."""
    needs, undefined, defined = Needs(), set[tuple[str, str]](), set[str]()
    for text in texts:
        needed_file = ""
        for line in text.splitlines():
            if found := re.search(r"\(NEEDED\).*\[(.+)\]", line):
                needs.libraries |= {found[1]} if CUDA_LIBRARY.match(found[1]) else set()
            elif line.startswith("Version definition section"):
                needed_file = ""
            elif found := re.search(r"\bFile: (\S+)\s+Cnt:", line):
                needed_file = found[1]
            elif (found := re.search(r"\bName: (\S+)\s+Flags:", line)) and CUDA_LIBRARY.match(needed_file):
                needs.versions[found[1]] = needed_file
            elif re.match(r"\s*\d+: [0-9a-f]{8,} ", line):
                fields = line.split()
                if len(fields) < 8:
                    continue
                name, _, version = fields[7].partition("@")
                if fields[6] == "UND":
                    undefined.add((name, version.strip("@")))
                else:
                    defined.add(name)
    needs.libraries |= set(needs.versions.values())
    for name, version in undefined:
        if version in needs.versions:
            needs.symbols[needs.versions[version], version].add(name)
        elif not version and CUDA_SYMBOL.match(name) and name not in defined:
            # Without a version any library will do, as the loader searches all of them.
            needs.symbols["libcudart.so.12", ""].add(name)
    return needs


def source_of(library: str, needs: Needs) -> tuple[str, str]:
    """Return the C source and the linker's version script of one stub library."""
    names = {name for (owner, _), group in needs.symbols.items() if owner == library for name in group}
    source = [SPECIAL.get(name, f"int {name}(void) {{ return {NO_DEVICE}; }}") for name in sorted(names)]
    script = [
        _version_node(version, needs.symbols.get((library, version), ()))
        for version, owner in needs.versions.items()
        if owner == library
    ]
    return "\n".join(source) + "\n", "\n".join(script) + "\n" if script else ""


def write_stub(library: str, needs: Needs, directory: Path, *, compiler: str = "gcc") -> Path:
    """Compile one stub library into a directory and return its path.

    Raises:
        subprocess.CalledProcessError: The compiler refused.
    """
    source, script = source_of(library, needs)
    written = directory / library
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "stub.c").write_text(source, encoding="utf-8")
        (Path(scratch) / "stub.map").write_text(script, encoding="utf-8")
        command = [compiler, "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{library}", "-o", str(written)]
        command += [f"-Wl,--version-script={scratch}/stub.map"] if script else []
        subprocess.run([*command, f"{scratch}/stub.c"], check=True)
    return written


def main() -> int:
    """Write the stubs beside torch's own libraries; 0 also where a torch without CUDA needs none."""
    missing = [tool for tool in ("gcc", "readelf") if shutil.which(tool) is None]
    if missing:
        sys.stderr.write(f"stub_cuda: {' and '.join(missing)} not found; fix: apt-get install gcc binutils\n")
        return 1
    directory = Path(sysconfig.get_paths()["purelib"], "torch", "lib")
    objects = sorted(p for p in directory.glob("lib*.so") if p.name.startswith(("libtorch", "libc10", "libcaffe2")))
    if not objects:
        sys.stderr.write(f"stub_cuda: no torch in {directory}; fix: install torch first\n")
        return 1
    needs = needs_of(objects)
    for library in sorted(needs.libraries):
        write_stub(library, needs, directory)
    count = len({name for group in needs.symbols.values() for name in group})
    sys.stdout.write(f"stub_cuda: {len(needs.libraries)} libraries, {count} symbols in {directory}\n")
    return 0


def _version_node(version: str, names: Iterable[str]) -> str:
    listed = " ".join(f"{name};" for name in sorted(names))
    return f"{version} {{ global: {listed} }};" if listed else f"{version} {{ }};"


def _readelf(*arguments: str) -> str:
    return subprocess.run(["readelf", *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    raise SystemExit(main())
