"""What AMD SMI tells of a GPU while it is measured; what it does not tell is absent."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

__all__ = ["read"]


def read(domain: int, bus: int, device: int) -> dict[str, float]:
    """Return clocks, power, temperature, utilisation and memory in use by name with unit.

    Args:
        domain: Of the GPU's PCI address: `HIP_VISIBLE_DEVICES` renumbers indices, and AMD SMI does not know.
        bus: The same.
        device: The same.

    Returns:
        Empty without the package `amdsmi` (part of ROCm) or where it finds no such GPU; without what one call
        refuses, or answers with `N/A`, otherwise.
    """
    opened = _open(domain, bus, device)
    if opened is None:
        return {}
    smi, handle = opened
    values: dict[str, float] = {}
    for name, ask in _questions(smi).items():
        try:
            values[name] = float(ask(handle))
        except (smi.AmdSmiException, KeyError, TypeError, ValueError):  # not told, under another name, or N/A
            continue
    return values


@functools.cache
def _open(domain: int, bus: int, device: int) -> tuple[Any, Any] | None:
    try:
        smi: Any = importlib.import_module("amdsmi")
    except (ImportError, OSError, KeyError):  # its library is loaded on import
        return None
    wanted = f"{domain:04x}:{bus:02x}:{device:02x}"
    try:
        smi.amdsmi_init()
        for handle in smi.amdsmi_get_processor_handles():
            if str(smi.amdsmi_get_gpu_device_bdf(handle)).lower().startswith(wanted):
                return smi, handle
    except smi.AmdSmiException:
        return None
    return None


def _questions(smi: Any) -> dict[str, Callable[[Any], float]]:
    def clock(kind: str) -> Callable[[Any], float]:
        return lambda gpu: smi.amdsmi_get_clock_info(gpu, getattr(smi.AmdSmiClkType, kind))["clk"]

    def temperature(gpu: Any) -> float:
        hottest, now = smi.AmdSmiTemperatureType.HOTSPOT, smi.AmdSmiTemperatureMetric.CURRENT
        return float(smi.amdsmi_get_temp_metric(gpu, hottest, now))

    def power(gpu: Any) -> float:
        told = smi.amdsmi_get_power_info(gpu)
        now = told.get("current_socket_power", "N/A")
        return float(told["average_socket_power"] if now == "N/A" else now)

    return {
        "sm_clock_mhz": clock("GFX"),
        "memory_clock_mhz": clock("MEM"),
        "power_watts": power,
        "temperature_celsius": temperature,
        "gpu_busy_percent": lambda gpu: smi.amdsmi_get_gpu_activity(gpu)["gfx_activity"],
        "memory_used_bytes": lambda gpu: smi.amdsmi_get_gpu_vram_usage(gpu)["vram_used"] * (1 << 20),
    }
