"""What users call: `rms_norm`, and `unsupported`, which says where its kernel does not run."""

from __future__ import annotations

from typing import Literal, overload

import torch

from kernel_pytorch._triton.launch import cannot_run
from kernel_pytorch.core.types import Skip
from kernel_pytorch.errors import InputsError
from kernel_pytorch.ops.rms_norm.op import add_rms_norm_op, rms_norm_op
from kernel_pytorch.ops.rms_norm.reference import rms_norm_reference

__all__ = ["Implementation", "rms_norm", "unsupported"]

Implementation = Literal["triton", "reference"]

LONGEST = 65536
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unsupported(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> Skip | None:
    """Return why the kernel does not run on these tensors; `None` where it does."""
    for tensor in (x, weight, residual):
        if tensor is not None and tensor.dtype not in _DTYPES:
            return Skip(f"the kernel takes bfloat16, float16 and float32, got {tensor.dtype}")
    if x.shape[-1] > LONGEST:
        return Skip(f"a row of {x.shape[-1]} elements does not fit in registers; at most {LONGEST}")
    return cannot_run(x, weight, residual)


@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = ...,
    residual: None = None,
    *,
    weight_offset: float = ...,
    round_before_weight: bool = ...,
    impl: Implementation | None = ...,
) -> torch.Tensor: ...


@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor,
    *,
    weight_offset: float = ...,
    round_before_weight: bool = ...,
    impl: Implementation | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    impl: Implementation | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalise rows by their root mean square; with `residual`, add it first and return the sum as well.

    Args:
        x: `[..., n]`, bfloat16, float16 or float32 (the reference: any floating-point dtype), any strides.
        weight: `[n]`.
        eps: Added to the mean square.
        residual: Shape and dtype of `x`; `h = x + residual` is rounded to that dtype and then normalised.
        weight_offset: Added to the weight: 1 for Gemma.
        round_before_weight: Round the normalised row to the dtype of `x` before the weight is applied, and return
            the promoted dtype, as Hugging Face's `LlamaRMSNorm` does; `torch.nn.RMSNorm` rounds once, last.
        impl: `triton`, `reference`, or `None` for the kernel where it runs.

    Returns:
        `y` of the shape of `x`, contiguous from the kernel; with `residual`, `(y, h)`.

    Raises:
        InputsError: Shapes or dtypes do not fit, or the kernel was asked for by name and does not run here.
    """
    n = x.shape[-1] if x.dim() else 0
    if n == 0 or weight.shape != (n,):
        raise InputsError(f"rms_norm: weight must be [n] for x [..., n], n > 0; got {[*weight.shape]}, {[*x.shape]}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise InputsError(
            f"rms_norm: residual must be like x, {x.dtype} {[*x.shape]}; got {residual.dtype} {[*residual.shape]}"
        )
    if impl not in (None, "triton", "reference"):
        raise InputsError(f"rms_norm: unknown impl {impl!r}; expected 'triton', 'reference' or None")
    skip = unsupported(x, weight, residual) if impl != "reference" else None
    if impl == "triton" and skip is not None:
        raise InputsError(f"rms_norm: {skip.reason}", fix=skip.fix)
    if impl == "reference" or skip is not None:
        y, h = rms_norm_reference(
            x, weight, eps, residual, weight_offset=weight_offset, round_before_weight=round_before_weight
        )
        return y if residual is None else (y, h)
    if residual is None:
        out: torch.Tensor = rms_norm_op(x, weight, eps, weight_offset, round_before_weight)[0]
        return out
    out, total, _ = add_rms_norm_op(x, residual, weight, eps, weight_offset, round_before_weight)
    return out, total
