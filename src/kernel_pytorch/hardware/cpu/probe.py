"""What the CPU is: instruction sets, the cores and the memory this process may use, and software versions."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import psutil
import torch

from kernel_pytorch.core.types import DeviceSpec, Skip
from kernel_pytorch.hardware.cpu import specs

__all__ = ["absent", "cache_bytes", "compiler_version", "detect", "software"]

_FLAGS = {
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "amx_bf16": "amx_bf16",
    "amx_fp16": "amx_fp16",
    "amx_int8": "amx_int8",
    "asimd": "neon",
    "asimddp": "dotprod",
    "fphp": "fp16",
    "bf16": "bf16",
    "i8mm": "i8mm",
    "sve": "sve",
    "sve2": "sve2",
}
"""Flags of /proc/cpuinfo (x86 `flags`, Arm `Features`) and the feature each stands for."""

_ARCH_ORDER = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve2", "sve", "bf16", "neon")
"""The instruction set that names the arch: the first that is present."""


def absent(index: int) -> Skip | None:
    """Return why the device is not there; `None` where it is."""
    return None if index == 0 else Skip(f"there is one CPU device, cpu:{index} does not exist", "use cpu")


def detect(index: int = 0) -> DeviceSpec:
    """Return the facts of this machine's CPU; its peak rates are measured, or read from an earlier measurement."""
    del index
    cores = usable_cores()
    name = cpu_name()
    flags = cpu_features()
    isa = next((flag for flag in _ARCH_ORDER if flag in flags), "generic")
    compiler = compiler_version()
    features = list(flags)
    if compiler and python_headers():
        features.append("cxx_compiler")
    rates = specs.peak_rates(f"{name}|{isa}|{cores}|{torch.__version__}", cores)
    return DeviceSpec(
        vendor="cpu",
        name=name,
        arch=f"{platform.machine()}-{isa}",
        memory_bytes=usable_memory_bytes(),
        num_devices=cores,
        features=tuple(sorted(features)),
        peak_flops=rates.flops,
        bandwidth_bytes_per_s=rates.bandwidth_bytes_per_s,
        software=software() | ({"compiler": compiler} if compiler else {}),
        sources=dict.fromkeys((*(f"peak_flops.{k}" for k in rates.flops), "bandwidth_bytes_per_s"), "measured"),
        verified=True,
    )


def cpu_name() -> str:
    """Return the CPU's marketing name, or the machine type where the kernel does not tell."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> tuple[str, ...]:
    """Return the instruction sets that decide which code runs; AMX only where the kernel grants the tiles."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    found = {_FLAGS[flag] for flag in flags if flag in _FLAGS}
    if not flags and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        found |= {"avx2"} | ({"avx512f"} if torch.backends.cpu.get_cpu_capability() == "AVX512" else set())
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    if tiles is not None and not tiles():
        found -= {"amx_bf16", "amx_fp16", "amx_int8"}
    return tuple(sorted(found))


def usable_cores() -> int:
    """Return the physical cores that affinity and the cgroup's quota leave to this process, at least one."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = {_read(Path(f"/sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list")) or str(i) for i in allowed}
    return max(1, math.ceil(min(float(len(siblings)), _cgroup_cores())))


def usable_memory_bytes() -> int:
    """Return the memory of the machine, or of the cgroup where that is less."""
    limits = [int(text) for text in _cgroup_values("memory", "memory.max", "memory.limit_in_bytes") if text.isdecimal()]
    return min([int(psutil.virtual_memory().total), *limits])


def cache_bytes() -> int:
    """Return the bytes of the last-level cache, all sockets together; 0 where the kernel does not tell."""
    last: dict[str, int] = {}
    level = 0
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        here = int(_read(index / "level") or 0)
        size = re.fullmatch(r"(\d+)([KMG]?)", _read(index / "size"))
        if size is None or here < level:
            continue
        if here > level:
            level, last = here, {}
        last[_read(index / "shared_cpu_list")] = int(size[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[size[2]]
    return sum(last.values())


def compiler_version() -> str:
    """Return the first line of the version of the C++ compiler that Inductor would take; empty where it finds none."""
    # torch._inductor.config.cpp.cxx: CXX, else g++ (clang++ on macOS); importing it costs over a second.
    command = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    path = shutil.which(command)
    if path is None:
        return ""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def python_headers() -> bool:
    """Return whether Python.h is there: the kernels that Inductor writes for a CPU include it."""
    return Path(sysconfig.get_paths()["include"], "Python.h").is_file()


def software() -> dict[str, str]:
    """Return the versions of what decides the generated code, the compiler apart."""
    versions = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
    }
    onednn = re.search(r"MKL-DNN v?([\d.]+)", torch.__config__.show())
    if onednn:
        versions["onednn"] = onednn[1]
    for package in ("triton", "torchao"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _cpuinfo(field: str) -> str:
    match = re.search(rf"^{field}\s*:\s*(.*)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return match[1].strip() if match else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _cgroup_cores() -> float:
    quotas = [math.inf]
    for text in _cgroup_values("cpu", "cpu.max", "cpu.cfs_quota_us"):
        quota, _, period = text.partition(" ")
        if quota.isdecimal():
            quotas.append(int(quota) / int(period or 100_000))
    return min(quotas)


def _cgroup_values(controller: str, v2_name: str, v1_name: str) -> list[str]:
    """Return the texts of a limit at every level of this process's cgroup, version 2 and version 1."""
    values = []
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            roots, name = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")), v2_name
        elif controller in controllers.split(","):
            roots, name = (Path("/sys/fs/cgroup", controllers), Path("/sys/fs/cgroup", controller)), v1_name
        else:
            continue
        for root in roots:
            for level in (Path(path), *Path(path).parents):
                text = _read(root / str(level).lstrip("/") / name)
                if text:
                    values.append(text)
    return values
