"""How to run and time on a device: one `HardwareManager` a vendor, and what it needs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from kernel_pytorch.hardware import split_device

if TYPE_CHECKING:
    from kernel_pytorch.core.protocols import HardwareManager

__all__ = ["manager_for", "one_process"]

_MANAGERS = {
    "amd": "AmdHardwareManager",
    "cpu": "CpuHardwareManager",
    "intel": "IntelHardwareManager",
    "nvidia": "NvidiaHardwareManager",
    "tpu": "TPUHardwareManager",
}


def manager_for(device: str = "auto") -> HardwareManager:
    """Return the manager of a device.

    Args:
        device: As `kernel_pytorch.hardware.detect` takes it.

    Raises:
        KptError: The device is unknown, not supported, or not present.
    """
    vendor, index = split_device(device)
    module = importlib.import_module(f"{__name__}.{vendor}.manager")
    manager: HardwareManager = getattr(module, _MANAGERS[vendor])(index)
    return manager


def one_process(manager: HardwareManager) -> bool:
    """Return whether one process at a time can have the manager's device, as a TPU's chip: then workers measure alone.

    Such a manager takes its device when something has to run on it, and not before.
    """
    return bool(getattr(manager, "one_process", False))
