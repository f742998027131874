"""What NVML tells of a GPU while it is measured; what it does not tell is absent."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

__all__ = ["read"]


def read(uuid: str) -> dict[str, float]:
    """Return clocks, power, temperature, utilisation and throttle reasons by name with unit.

    Args:
        uuid: The GPU's UUID as torch tells it: `CUDA_VISIBLE_DEVICES` renumbers indices, and NVML does not know.

    Returns:
        Empty without the package `nvidia-ml-py` or where NVML refuses; without what one call refuses otherwise.
        `throttle_reasons` is NVML's bit field (`nvmlClocksThrottleReasons`), 0 where nothing holds the clocks down.
    """
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return {}
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
    except nvml.NVMLError:
        return {}
    values: dict[str, float] = {}
    for name, ask in _questions(nvml).items():
        try:
            values[name] = float(ask(handle))
        except nvml.NVMLError:
            continue
    return values


def _questions(nvml: Any) -> dict[str, Callable[[Any], float]]:
    reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
    reasons = reasons or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
    return {
        "sm_clock_mhz": lambda gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
        "power_watts": lambda gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
        "temperature_celsius": lambda gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
        "gpu_busy_percent": lambda gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
        "memory_used_bytes": lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
        "throttle_reasons": reasons,
    }
