"""Layer normalisation (Ba, Kiros and Hinton, arXiv:1607.06450), with the residual addition before it."""

from kernel_pytorch.ops.layer_norm.api import layer_norm, unsupported

__all__ = ["layer_norm", "unsupported"]
