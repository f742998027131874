"""Linear layers whose three matrix products run by measured algorithms of cuBLASLt."""

from kernel_pytorch.ops.linear.api import linear, unsupported

__all__ = ["linear", "unsupported"]
