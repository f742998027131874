"""Rotary position embedding of queries and keys (Su et al., arXiv:2104.09864), both in one kernel."""

from kernel_pytorch.ops.rope.api import rope, unsupported

__all__ = ["rope", "unsupported"]
