"""What users call: `layer_norm`, and `unsupported`, which says where its kernel does not run."""

from __future__ import annotations

from typing import Literal, overload

import torch

from kernel_pytorch._triton.launch import cannot_run
from kernel_pytorch.core.types import Skip
from kernel_pytorch.errors import InputsError
from kernel_pytorch.ops.layer_norm.op import add_layer_norm_op, layer_norm_op
from kernel_pytorch.ops.layer_norm.reference import layer_norm_reference

__all__ = ["Implementation", "layer_norm", "unsupported"]

Implementation = Literal["triton", "reference"]

LONGEST = 65536
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unsupported(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> Skip | None:
    """Return why the kernel does not run on these tensors; `None` where it does."""
    for tensor in (x, weight, bias, residual):
        if tensor is not None and tensor.dtype not in _DTYPES:
            return Skip(f"the kernel takes bfloat16, float16 and float32, got {tensor.dtype}")
    if x.shape[-1] > LONGEST:
        return Skip(f"a row of {x.shape[-1]} elements does not fit in registers; at most {LONGEST}")
    return cannot_run(x, weight, bias, residual)


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = ...,
    eps: float = ...,
    residual: None = None,
    *,
    impl: Implementation | None = ...,
) -> torch.Tensor: ...


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor,
    *,
    impl: Implementation | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    *,
    impl: Implementation | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalise rows to mean 0 and variance 1; with `residual`, add it first and return the sum as well.

    Args:
        x: `[..., n]`, bfloat16, float16 or float32 (the reference: any floating-point dtype), any strides.
        weight: `[n]`.
        bias: `[n]` of the dtype of `weight`, or `None` for zero.
        eps: Added to the variance.
        residual: Shape and dtype of `x`; `h = x + residual` is rounded to that dtype and then normalised.
        impl: `triton`, `reference`, or `None` for the kernel where it runs.

    Returns:
        `y` of the shape and dtype of `x`, contiguous from the kernel; with `residual`, `(y, h)`.

    Raises:
        InputsError: Shapes or dtypes do not fit, or the kernel was asked for by name and does not run here.
    """
    n = x.shape[-1] if x.dim() else 0
    if n == 0 or weight.shape != (n,):
        raise InputsError(f"layer_norm: weight must be [n] for x [..., n], n > 0; got {[*weight.shape]}, {[*x.shape]}")
    if bias is not None and (bias.shape != weight.shape or bias.dtype != weight.dtype):
        raise InputsError(
            f"layer_norm: bias must be like weight, {weight.dtype} [{n}]; got {bias.dtype} {[*bias.shape]}"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise InputsError(
            f"layer_norm: residual must be like x, {x.dtype} {[*x.shape]}; got {residual.dtype} {[*residual.shape]}"
        )
    if impl not in (None, "triton", "reference"):
        raise InputsError(f"layer_norm: unknown impl {impl!r}; expected 'triton', 'reference' or None")
    skip = unsupported(x, weight, bias, residual) if impl != "reference" else None
    if impl == "triton" and skip is not None:
        raise InputsError(f"layer_norm: {skip.reason}", fix=skip.fix)
    if impl == "reference" or skip is not None:
        y, h = layer_norm_reference(x, weight, bias, eps, residual)
        return y if residual is None else (y, h)
    if residual is None:
        out: torch.Tensor = layer_norm_op(x, weight, bias, eps)[0]
        return out
    out, total, *_ = add_layer_norm_op(x, residual, weight, bias, eps)
    return out, total
