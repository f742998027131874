"""How to run, compile and time on TPUs, over TorchTPU or PyTorch/XLA; unverified: nobody has run it on a chip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernel_pytorch.backends.tpu.manager import TPUHardwareManager

__all__ = ["TPUHardwareManager"]


def __getattr__(name: str) -> Any:
    if name == "TPUHardwareManager":
        from kernel_pytorch.backends.tpu.manager import TPUHardwareManager

        return TPUHardwareManager
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
