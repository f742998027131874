"""Run and time on an AMD GPU, over `torch.cuda`, which is what torch's ROCm build calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kernel_pytorch.backends.accelerator import Accelerator
from kernel_pytorch.backends.amd import telemetry

__all__ = ["AmdHardwareManager"]


class AmdHardwareManager(Accelerator):
    """The manager of one GPU; its last-level cache is the Infinity Cache."""

    vendor = "amd"
    torch_type = "cuda"

    def telemetry(self) -> Mapping[str, float]:
        """Return clocks, power and temperature; without AMD SMI's package, none."""
        properties: Any = torch.cuda.get_device_properties(self._device)
        address = (int(getattr(properties, f"pci_{part}_id", -1)) for part in ("domain", "bus", "device"))
        return telemetry.read(*address)
