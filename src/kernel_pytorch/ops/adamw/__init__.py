"""AdamW over all parameters in one launch."""

from kernel_pytorch.ops.adamw.api import Tables, step, unsupported

__all__ = ["Tables", "step", "unsupported"]
