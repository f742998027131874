"""What NVML tells of a GPU while it is measured; what it does not tell is absent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kernel_pytorch.hardware.nvidia.nvml import Gpu, open_gpu

__all__ = ["read"]


def read(uuid: str) -> dict[str, float]:
    """Return clocks, power, temperature, utilisation and throttle reasons by name with unit.

    Of a MIG slice, clocks, power and temperature are those of the GPU that it is part of; memory is its own.

    Args:
        uuid: The GPU's UUID as torch tells it.

    Returns:
        Empty without the package `nvidia-ml-py` or where NVML refuses; without what one call refuses otherwise.
        `throttle_reasons` is NVML's bit field (`nvmlClocksThrottleReasons`), 0 where nothing holds the clocks down.
    """
    gpu = open_gpu(uuid)
    if gpu is None:
        return {}
    values: dict[str, float] = {}
    for name, ask in _questions(gpu).items():
        try:
            values[name] = float(ask(gpu.handle))
        except gpu.nvml.NVMLError:
            continue
    return values


def _questions(gpu: Gpu) -> dict[str, Callable[[Any], float]]:
    nvml, own = gpu.nvml, gpu.handle if gpu.mig is None else gpu.mig
    reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
    reasons = reasons or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
    return {
        "sm_clock_mhz": lambda handle: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda handle: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "power_watts": lambda handle: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "temperature_celsius": lambda handle: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "gpu_busy_percent": lambda handle: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "memory_used_bytes": lambda _: nvml.nvmlDeviceGetMemoryInfo(own).used,
        "throttle_reasons": reasons,
    }
