"""What an AMD GPU is, by LLVM target and properties; torch calls it `cuda`, and its name decides nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kernel_pytorch.core.types import DeviceSpec, Skip
from kernel_pytorch.hardware.amd import specs
from kernel_pytorch.hardware.cpu import probe as host

__all__ = ["VERIFIED_ARCHES", "absent", "cache_bytes", "detect"]

VERIFIED_ARCHES: frozenset[str] = frozenset()
"""Arches on which `tests/contracts` has been run on real hardware: none yet."""

_DRIVER = Path("/sys/module/amdgpu/version")


def absent(index: int) -> Skip | None:
    """Return why the GPU is not there; `None` where it is."""
    if torch.version.hip is None:
        return Skip(
            f"this build of torch ({torch.__version__}) has no ROCm support",
            "pip install torch --index-url https://download.pytorch.org/whl/rocm6.4",
        )
    count = torch.cuda.device_count()
    if count == 0:
        return Skip("no AMD GPU is visible", "check rocm-smi, HIP_VISIBLE_DEVICES and the groups render and video")
    if index >= count:
        return Skip(f"only {count} AMD GPU(s) are visible", f"use amd:0 to amd:{count - 1}")
    return None


def detect(index: int = 0) -> DeviceSpec:
    """Return the facts of one GPU (of an MI250X, one of its two) and how many of its kind are visible."""
    properties = torch.cuda.get_device_properties(index)
    arch = _arch(properties)
    alike = sum(_kind(torch.cuda.get_device_properties(i)) == _kind(properties) for i in range(_count()))
    rates = specs.peak_rates(
        arch,
        compute_units=properties.multi_processor_count,
        clock_khz=getattr(properties, "clock_rate", 0),
        memory_bytes=properties.total_memory,
    )
    features = list(specs.features(arch))
    compiler = host.compiler_version()
    if compiler and host.python_headers():
        features.append("cxx_compiler")
    versions = host.software() | ({"compiler": compiler} if compiler else {})
    return DeviceSpec(
        vendor="amd",
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
    """Return the bytes of the last-level cache of the first GPU: the Infinity Cache where there is one, else the L2."""
    properties = torch.cuda.get_device_properties(0)
    l2 = int(getattr(properties, "L2_cache_size", 0))
    return max(l2, specs.last_level_cache_bytes(_arch(properties)))


def _count() -> int:
    return int(torch.cuda.device_count())


def _arch(properties: Any) -> str:
    """Return the LLVM target without its features: `gfx942` of `gfx942:sramecc+:xnack-`."""
    return str(properties.gcnArchName).partition(":")[0]


def _kind(properties: Any) -> tuple[str, int, int]:
    return _arch(properties), int(properties.multi_processor_count), int(properties.total_memory)


def _versions() -> dict[str, str]:
    """Return the versions of the libraries and the driver; what is not told is absent."""
    found = {"rocm": str(torch.version.hip)}
    libraries: Any = torch.backends.cudnn  # MIOpen under this name
    if libraries.is_available():
        found["miopen"] = str(libraries.version())
    if hasattr(torch._C, "_nccl_version"):  # noqa: SLF001  RCCL under this name; torch.cuda.nccl would raise without
        found["rccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    try:
        found["driver"] = _DRIVER.read_text(encoding="utf-8").strip()
    except OSError:
        return found  # the driver that is part of the kernel has no version of its own
    return found
