"""What an NVIDIA GPU is, by compute capability and properties; its name decides nothing."""

from __future__ import annotations

import re
from typing import Any

import torch

from kernel_pytorch.core.types import DeviceSpec, Skip
from kernel_pytorch.hardware.cpu import probe as host
from kernel_pytorch.hardware.nvidia import specs

__all__ = ["VERIFIED_ARCHES", "absent", "cache_bytes", "detect"]

VERIFIED_ARCHES: frozenset[str] = frozenset({"sm_90"})
"""Arches on which `tests/contracts` has been run on real hardware."""


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
    """Return the facts of one GPU and how many of its kind are visible."""
    properties = torch.cuda.get_device_properties(index)
    arch = f"sm_{properties.major}{properties.minor}"
    alike = sum(_same(index, other) for other in range(torch.cuda.device_count()))
    rates = specs.peak_rates(
        (properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        clock_khz=getattr(properties, "clock_rate", 0),
        memory_bytes=properties.total_memory,
        memory_clock_khz=getattr(properties, "memory_clock_rate", 0),
        memory_bus_bits=getattr(properties, "memory_bus_width", 0),
    )
    features = ["cuda", *specs.features((properties.major, properties.minor))]
    compiler = host.compiler_version()
    if compiler and host.python_headers():
        features.append("cxx_compiler")
    versions = host.software() | ({"compiler": compiler} if compiler else {})
    return DeviceSpec(
        vendor="nvidia",
        name=properties.name,
        arch=arch,
        memory_bytes=properties.total_memory,
        num_devices=alike,
        features=tuple(sorted(features)),
        peak_flops=rates.flops,
        bandwidth_bytes_per_s=rates.bandwidth_bytes_per_s,
        software=versions | _versions(),
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


def _versions() -> dict[str, str]:
    versions = {"cuda": str(torch.version.cuda)}
    cudnn: Any = torch.backends.cudnn
    if cudnn.is_available():
        versions["cudnn"] = str(cudnn.version())
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:  # noqa: PTH123
            driver = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", file.read())
    except OSError:
        driver = None
    if driver:
        versions["driver"] = driver[0]
    return versions
