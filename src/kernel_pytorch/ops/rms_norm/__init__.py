"""Root-mean-square normalisation (Zhang and Sennrich, arXiv:1910.07467), with the residual addition before it."""

from kernel_pytorch.ops.rms_norm.api import rms_norm, unsupported

__all__ = ["rms_norm", "unsupported"]
