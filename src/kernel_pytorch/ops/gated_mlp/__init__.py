"""The gated activations of MLPs (Shazeer, arXiv:2002.05202): SwiGLU and GEGLU, between the projections."""

from kernel_pytorch.ops.gated_mlp.api import gated_mlp, geglu, swiglu, unsupported

__all__ = ["gated_mlp", "geglu", "swiglu", "unsupported"]
