"""What an NVIDIA GPU is, by compute capability and properties; its name decides nothing."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import torch

from kernel_pytorch.core.types import DeviceSpec, Skip
from kernel_pytorch.hardware.cpu import probe as host
from kernel_pytorch.hardware.nvidia import nvml, specs

__all__ = ["VERIFIED_ARCHES", "absent", "cache_bytes", "detect"]

VERIFIED_ARCHES: frozenset[str] = frozenset({"sm_90"})
"""Arches on which `tests/contracts` has been run on real hardware."""

_MAPS = Path("/proc/self/maps")
_DRIVER = Path("/proc/driver/nvidia/version")


def absent(index: int) -> Skip | None:
    """Return why the GPU is not there; `None` where it is."""
    if torch.version.cuda is None:
        return Skip(
            f"this build of torch ({torch.__version__}) has no CUDA support",
            "pip install torch --index-url https://download.pytorch.org/whl/cu130",
        )
    count = torch.cuda.device_count()
    if count == 0:
        return Skip("no NVIDIA GPU is visible", "check nvidia-smi and CUDA_VISIBLE_DEVICES")
    if index >= count:
        return Skip(f"only {count} NVIDIA GPU(s) are visible", f"use cuda:0 to cuda:{count - 1}")
    return None


def detect(index: int = 0) -> DeviceSpec:
    """Return the facts of one GPU, or MIG slice, and how many of its kind are visible."""
    properties = torch.cuda.get_device_properties(index)
    arch = f"sm_{properties.major}{properties.minor}"
    alike = [other for other in range(torch.cuda.device_count()) if _same(index, other)]
    told = nvml.facts(_uuid(index), [_uuid(other) for other in alike if other != index])
    memory_bytes, whole = int(properties.total_memory), told.mig is None  # of a slice, the bus may be told either way
    rates = specs.peak_rates(
        (properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        clock_khz=getattr(properties, "clock_rate", 0),
        memory_bytes=memory_bytes if told.mig is None else told.mig.gpu_memory_bytes,
        memory_clock_khz=getattr(properties, "memory_clock_rate", 0) if whole else 0,
        memory_bus_bits=getattr(properties, "memory_bus_width", 0) if whole else 0,
    )
    features = ["cuda", *specs.features((properties.major, properties.minor))]
    if told.nvlinks:
        features.append("nvlink")
    if told.peers and told.peers == len(alike) - 1:
        features.append("nvlink_peers")
    if told.mig is not None:
        features.append("mig")
        memory_bytes = min(memory_bytes, told.mig.memory_bytes)
        rates = specs.of_slice(rates, told.mig.memory_bytes / told.mig.gpu_memory_bytes)
    compiler = host.compiler_version()
    if compiler and host.python_headers():
        features.append("cxx_compiler")
    versions = host.software() | ({"compiler": compiler} if compiler else {})
    return DeviceSpec(
        vendor="nvidia",
        name=properties.name,
        arch=arch,
        memory_bytes=memory_bytes,
        num_devices=len(alike),
        features=tuple(sorted(features)),
        peak_flops=rates.flops,
        bandwidth_bytes_per_s=rates.bandwidth_bytes_per_s,
        software=versions | _versions(told),
        sources=rates.sources,
        verified=arch in VERIFIED_ARCHES,
    )


def cache_bytes() -> int:
    """Return the bytes of the L2 cache of the first GPU; 0 where the driver does not tell."""
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0))


def _same(one: int, other: int) -> bool:
    a, b = torch.cuda.get_device_properties(one), torch.cuda.get_device_properties(other)
    return (a.major, a.minor, a.multi_processor_count, a.total_memory) == (
        b.major,
        b.minor,
        b.multi_processor_count,
        b.total_memory,
    )


def _uuid(index: int) -> str:
    return str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))


def _versions(told: nvml.Facts) -> dict[str, str]:
    """Return the versions of the libraries and the driver, and the links; what is not told is absent."""
    cudnn: Any = torch.backends.cudnn
    found = {
        "cuda": str(torch.version.cuda),
        "cudnn": str(cudnn.version()) if cudnn.is_available() else "",
        "cublas": _cublas_version(),
        "nccl": _nccl_version(),
        "driver": _driver_version() or told.driver,
        "pcie": told.pcie,
        "nvlink": f"{told.nvlinks} links, version {told.nvlink_version}" if told.nvlinks else "",
        "mig": "" if told.mig is None else f"{told.mig.multiprocessors or 'some'} multiprocessors",
    }
    return {name: version for name, version in found.items() if version}


def _driver_version() -> str:
    try:
        driver = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return ""
    return driver[0] if driver else ""


def _nccl_version() -> str:
    if not hasattr(torch._C, "_nccl_version"):  # noqa: SLF001  a build without NCCL; torch.cuda.nccl would raise
        return ""
    version: Any = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(str(part) for part in version) if isinstance(version, tuple) else str(version)


def _cublas_version() -> str:
    """Return what the cuBLASLt library that torch has loaded says of itself (`cublasLtGetVersion`, 130002 is 13.0.2).

    Its package, if it came from one, has a name for each CUDA release, and a system's has none.
    """
    try:
        mapped = re.search(r"\S*/libcublasLt\.so\S*", _MAPS.read_text(encoding="utf-8"))
        if mapped is None:
            return ""
        ask = ctypes.CDLL(mapped[0]).cublasLtGetVersion
    except (OSError, AttributeError):
        return ""
    ask.restype = ctypes.c_size_t
    return str(ask())
