"""What users call: `linear`, and `unsupported`, which says where the measured products stop."""

from __future__ import annotations

import functools

import torch
from torch.nn import functional

from kernel_pytorch.backends.nvidia import cublaslt
from kernel_pytorch.core.types import Skip
from kernel_pytorch.ops.linear.op import linear_op

__all__ = ["linear", "unsupported"]


@functools.cache
def _unavailable() -> Skip | None:
    return cublaslt.unavailable()


def unsupported(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Skip | None:
    """Return why the products of this layer are left to PyTorch; `None` where they are not.

    They take bfloat16 and float16 on an NVIDIA GPU, all operands of one dtype, outside autocast.
    """
    if x.device.type != "cuda":
        return Skip(f"cuBLASLt runs on NVIDIA GPUs, got a tensor on {x.device.type}")
    if torch.is_autocast_enabled(x.device.type):
        return Skip("under autocast PyTorch casts the operands", "cast the model to bfloat16")
    if x.dtype not in cublaslt.DTYPES:
        return Skip(f"the products take bfloat16 and float16, got {x.dtype}")
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return Skip(f"operands differ in dtype: {x.dtype}, {weight.dtype}")
    # Dynamo would look into the search for the library; who compiles this has asked before, or gets the error.
    return None if torch.compiler.is_compiling() else _unavailable()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x @ weight.T + bias`, as `torch.nn.functional.linear` does; where `unsupported`, by that function.

    The three products (result, gradient of `x`, gradient of `weight`) each run by the algorithm of cuBLASLt that was
    the fastest at their shape, measured at its first use and kept (`choice`). Sums are float32 throughout.

    Args:
        x: `[..., in_features]`.
        weight: `[out_features, in_features]`.
        bias: `[out_features]`.

    Returns:
        `[..., out_features]`, in the dtype of `x`.
    """
    if unsupported(x, weight, bias) is not None:
        return functional.linear(x, weight, bias)
    y: torch.Tensor = linear_op(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])
