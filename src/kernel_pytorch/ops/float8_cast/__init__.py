"""Casts of matrices to FP8 (E4M3 and E5M2; Micikevicius et al., arXiv:2209.05433), with their transposed copies."""

from kernel_pytorch.ops.float8_cast.api import Float8Matrix, float8_cast, unsupported
from kernel_pytorch.ops.float8_cast.layout import E4M3, E5M2, FORMATS, fresh_state, padded

__all__ = ["E4M3", "E5M2", "FORMATS", "Float8Matrix", "float8_cast", "fresh_state", "padded", "unsupported"]
