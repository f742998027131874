"""What users call: `block_cast`, and `unsupported`, which says where its kernel does not run."""

from __future__ import annotations

import torch

from kernel_pytorch._triton.launch import INTERPRETED, cannot_run
from kernel_pytorch.core.types import Skip
from kernel_pytorch.errors import InputsError
from kernel_pytorch.ops.block_cast.formats import BLOCK_FORMATS, BlockMatrix
from kernel_pytorch.ops.block_cast.reference import block_cast_reference

__all__ = ["block_cast", "unsupported"]

_CAPABILITY = {"e4m3": (8, 9), "e2m1": (10, 0)}


def unsupported(x: torch.Tensor, name: str) -> Skip | None:
    """Return why the kernel does not cast this matrix to a format; `None` where it does."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return Skip(f"the kernel takes bfloat16, float16 and float32, got {x.dtype}")
    skip = cannot_run(x)
    if skip is None and x.is_cuda and not INTERPRETED:
        if torch.version.hip is not None:
            return Skip("block formats are written for NVIDIA GPUs")
        least = _CAPABILITY[BLOCK_FORMATS[name].element]
        if torch.cuda.get_device_capability(x.device) < least:
            return Skip(f"{name} needs compute capability {least[0]}.{least[1]} or newer")
    return skip


def block_cast(x: torch.Tensor, name: str) -> BlockMatrix:
    """Return a matrix in a block format, on a GPU by a kernel, else by the definition. There is no gradient.

    The kernels compile for their targets and are right under Triton's interpreter; on a GPU they have not been run.

    Args:
        x: `[rows, columns]`; blocks divide both.
        name: `fp8_1x128`, `fp8_128x128`, `mxfp8` or `nvfp4` (`BLOCK_FORMATS`).

    Raises:
        InputsError: An unknown format, no matrix of numbers, or blocks do not divide it.
    """
    if name not in BLOCK_FORMATS:
        raise InputsError(f"no block format is called {name!r}", fix=f"one of: {', '.join(BLOCK_FORMATS)}")
    kind = BLOCK_FORMATS[name]
    if x.dim() != 2 or not x.is_floating_point() or x.shape[0] % kind.rows or x.shape[1] % kind.columns:
        raise InputsError(f"{name} takes matrices that blocks of {kind.rows} x {kind.columns} divide, got {[*x.shape]}")
    x = x.detach()
    if x.numel() and unsupported(x, name) is None:
        from kernel_pytorch.ops.block_cast.block_cast_kernel import cast

        return cast(x, kind)
    return block_cast_reference(x, kind)
