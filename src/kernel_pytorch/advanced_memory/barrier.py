"""An identity that a compiler may not look through: XLA's optimization barrier, where there is an XLA."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["hold_apart"]


def hold_apart(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return equal tensors that a compiler takes for others, ready only when all of the given ones are.

    What is computed from them is neither merged with what was computed before nor started early. Without gradients:
    for the inside of an `autograd.Function`.

    Args:
        tensors: Any shapes and dtypes, on one device. On a `tpu` (TorchTPU) and an `xla` device (PyTorch/XLA) this is
            `stablehlo.optimization_barrier`; elsewhere nothing merges whole steps, and they come back as they are.
    """
    given = list(tensors)
    kind = next((t.device.type for t in given), "cpu")
    if kind == "tpu":
        # A barrier of a view keeps its strides: written out, that is a flat copy of what it is a view of, and a
        # partitioner tells by masks of the whole of it which elements of the copy are whose.
        held: list[torch.Tensor] = torch.ops.tpu._optimization_barrier([t.contiguous() for t in given])  # noqa: SLF001
        return list(held)
    if kind == "xla":
        from kernel_pytorch.backends.tpu.torch_xla import optimization_barrier

        return optimization_barrier(given)
    return given
