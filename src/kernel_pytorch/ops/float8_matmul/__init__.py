"""Products of FP8 matrices with scales."""

from kernel_pytorch.ops.float8_matmul.api import emulated, float8_matmul, unsupported

__all__ = ["emulated", "float8_matmul", "unsupported"]
