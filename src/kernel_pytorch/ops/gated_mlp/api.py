"""What users call: `swiglu`, `geglu`, `gated_mlp`, and `unsupported`, which says where the kernel does not run."""

from __future__ import annotations

from typing import Literal

import torch

from kernel_pytorch._triton.launch import cannot_run
from kernel_pytorch.core.types import Skip
from kernel_pytorch.errors import InputsError
from kernel_pytorch.ops.gated_mlp.op import gated_mlp_op
from kernel_pytorch.ops.gated_mlp.reference import ACTIVATIONS, gated_mlp_reference

__all__ = ["Implementation", "gated_mlp", "geglu", "swiglu", "unsupported"]

Implementation = Literal["triton", "reference"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unsupported(gate: torch.Tensor, up: torch.Tensor) -> Skip | None:
    """Return why the kernel does not run on these tensors; `None` where it does."""
    if gate.dtype not in _DTYPES:
        return Skip(f"the kernel takes bfloat16, float16 and float32, got {gate.dtype}")
    return cannot_run(gate, up)


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, impl: Implementation | None = None) -> torch.Tensor:
    """Return `silu(gate) * up`; see `gated_mlp`."""
    return gated_mlp(gate, up, "silu", impl=impl)


def geglu(
    gate: torch.Tensor,
    up: torch.Tensor,
    approximate: Literal["none", "tanh"] = "none",
    *,
    impl: Implementation | None = None,
) -> torch.Tensor:
    """Return `gelu(gate) * up`, `approximate` as in `torch.nn.functional.gelu`; see `gated_mlp`."""
    if approximate not in ("none", "tanh"):
        raise InputsError(f"geglu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return gated_mlp(gate, up, "gelu" if approximate == "none" else "gelu_tanh", impl=impl)


def gated_mlp(
    gate: torch.Tensor, up: torch.Tensor, activation: str = "silu", *, impl: Implementation | None = None
) -> torch.Tensor:
    """Return `activation(gate) * up` in one pass over memory, and its gradients in one.

    Args:
        gate: `[..., n]`, bfloat16, float16 or float32 (the reference: any floating-point dtype), any strides; the
            halves of one projection need no copy.
        up: Shape and dtype of `gate`.
        activation: `silu`, `gelu` or `gelu_tanh`.
        impl: `triton`, `reference`, or `None` for the kernel where it runs.

    Returns:
        The shape and dtype of `gate`; computed in float32 and rounded once; contiguous from the kernel.

    Raises:
        InputsError: Shapes or dtypes do not fit, or the kernel was asked for by name and does not run here.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.dim() == 0:
        raise InputsError(
            f"gated_mlp: gate and up must be alike, of one dimension or more; got {gate.dtype} {[*gate.shape]} and "
            f"{up.dtype} {[*up.shape]}"
        )
    if activation not in ACTIVATIONS:
        raise InputsError(f"gated_mlp: unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    if impl not in (None, "triton", "reference"):
        raise InputsError(f"gated_mlp: unknown impl {impl!r}; expected 'triton', 'reference' or None")
    skip = unsupported(gate, up) if impl != "reference" else None
    if impl == "triton" and skip is not None:
        raise InputsError(f"gated_mlp: {skip.reason}", fix=skip.fix)
    if impl == "reference" or skip is not None:
        return gated_mlp_reference(gate, up, activation)
    out: torch.Tensor = gated_mlp_op(gate, up, activation)
    return out
