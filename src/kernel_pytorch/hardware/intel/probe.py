"""What an Intel GPU is, by SYCL's architecture number and aspects; its name decides nothing."""

from __future__ import annotations

from typing import Any

import torch

from kernel_pytorch.core.types import DeviceSpec, Skip
from kernel_pytorch.hardware.cpu import probe as host
from kernel_pytorch.hardware.intel import specs

__all__ = ["VERIFIED_ARCHES", "absent", "cache_bytes", "detect"]

VERIFIED_ARCHES: frozenset[str] = frozenset()
"""Arches on which `tests/contracts` has been run on real hardware: none yet."""

_ASPECTS = {
    "has_fp16": "fp16",
    "has_fp64": "fp64",
    "has_bfloat16_conversions": "bf16",
    "has_subgroup_matrix_multiply_accumulate": "xmx",
    "has_subgroup_matrix_multiply_accumulate_tensor_float32": "tf32",
}
"""What torch tells of the driver's answers, and the feature each stands for."""


def absent(index: int) -> Skip | None:
    """Return why the GPU is not there; `None` where it is."""
    if getattr(torch.version, "xpu", None) is None:
        return Skip(
            f"Intel GPUs are not supported by this build of torch ({torch.__version__})",
            "pip install torch --index-url https://download.pytorch.org/whl/xpu",
        )
    count = torch.xpu.device_count()
    if count == 0:
        return Skip("no Intel GPU is visible", "check xpu-smi, ZE_AFFINITY_MASK and the group render")
    if index >= count:
        return Skip(f"only {count} Intel GPU(s) are visible", f"use xpu:0 to xpu:{count - 1}")
    return None


def detect(index: int = 0) -> DeviceSpec:
    """Return the facts of one GPU (of one with two tiles, usually a tile) and how many of its kind are visible."""
    properties: Any = torch.xpu.get_device_properties(index)
    arch = _arch(properties)
    alike = sum(_kind(torch.xpu.get_device_properties(i)) == _kind(properties) for i in range(torch.xpu.device_count()))
    rates = specs.peak_rates(
        arch, vector_engines=int(getattr(properties, "gpu_eu_count", 0)), memory_bytes=properties.total_memory
    )
    features = ["triton", "xpu", *(name for told, name in _ASPECTS.items() if getattr(properties, told, False))]
    compiler = host.compiler_version()
    if compiler and host.python_headers():
        features.append("cxx_compiler")
    versions = host.software() | ({"compiler": compiler} if compiler else {})
    driver = str(getattr(properties, "driver_version", ""))
    return DeviceSpec(
        vendor="intel",
        name=properties.name,
        arch=arch,
        memory_bytes=properties.total_memory,
        num_devices=alike,
        features=tuple(sorted(features)),
        peak_flops=rates.flops,
        bandwidth_bytes_per_s=rates.bandwidth_bytes_per_s,
        software=versions | {"oneapi": str(torch.version.xpu)} | ({"driver": driver} if driver else {}),
        sources=rates.sources,
        verified=arch in VERIFIED_ARCHES,
    )


def cache_bytes() -> int:
    """Return the bytes of the last-level cache of the first GPU; 0 where the driver does not tell."""
    return int(getattr(torch.xpu.get_device_properties(0), "last_level_cache_size", 0))


def _arch(properties: Any) -> str:
    return specs.arch_of(int(getattr(properties, "architecture", 0)))


def _kind(properties: Any) -> tuple[str, int, int]:
    return _arch(properties), int(getattr(properties, "gpu_eu_count", 0)), int(properties.total_memory)
