"""Run and time on an Intel GPU, over `torch.xpu`."""

from __future__ import annotations

from collections.abc import Mapping

from kernel_pytorch.backends.accelerator import Accelerator

__all__ = ["IntelHardwareManager"]


class IntelHardwareManager(Accelerator):
    """The manager of one GPU, or of one tile where the driver shows tiles as devices."""

    vendor = "intel"
    torch_type = "xpu"

    def telemetry(self) -> Mapping[str, float]:
        """Return nothing: torch tells none, and Level Zero's Sysman has no Python package to ask."""
        return {}
