"""Casts of matrices to narrow formats whose scales belong to blocks: DeepSeek's FP8, MXFP8 and NVFP4."""

from kernel_pytorch.ops.block_cast.api import block_cast, unsupported
from kernel_pytorch.ops.block_cast.formats import BLOCK_FORMATS, BlockFormat, BlockMatrix
from kernel_pytorch.ops.block_cast.reference import dequantised

__all__ = ["BLOCK_FORMATS", "BlockFormat", "BlockMatrix", "block_cast", "dequantised", "unsupported"]
