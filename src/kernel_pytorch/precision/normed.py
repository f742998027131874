"""An RMSNorm whose result FP8 layers read: compiled code need not write it, for the cast computes it on the way.

The norm stays what it is, and its result goes where it went; beside it lies what it was made of, which the layers'
site takes. Where they are compiled together and nothing else reads the result, the compiler drops it: what is written
are the norm's input, as its backward needs it anyway, and FP8.
"""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["NORM_SLOT", "Normed", "Origin", "restore_norm", "watch_norm"]

NORM_SLOT = "_float8_norm"


class Origin(NamedTuple):
    """What a cast reads: a matrix, and factors of its rows and columns, or `None` for both.

    Attributes:
        x: `[rows, columns]`.
        row_factor: Float32 `[rows]`: one over the root of the mean square.
        column_factor: `[columns]`: the norm's weight.
    """

    x: torch.Tensor
    row_factor: torch.Tensor | None = None
    column_factor: torch.Tensor | None = None

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Both factors, or `None`."""
        if self.row_factor is None or self.column_factor is None:
            return None
        return self.row_factor, self.column_factor


class Normed:
    """A norm before layers in FP8.

    Args:
        eps: Of the norm.
        weight_offset: Added to its weight.

    Attributes:
        made: What the norm returned while it was traced, its input and its weight, until a site takes it.
        used: Whether a site in FP8 is there to take it.
    """

    def __init__(self, eps: float, weight_offset: float) -> None:
        self.eps = eps
        self.weight_offset = weight_offset
        self.made: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.used = True

    def __getstate__(self) -> dict[str, Any]:
        """Leave tensors of a trace out of copies and pickles."""
        return {**vars(self), "made": None}

    def origin(self, y: torch.Tensor) -> Origin | None:
        """Return what makes `y`; `None` where the norm did not make it in the code that is being compiled."""
        made, self.made = self.made, None
        if made is None or made[0] is not y:
            return None
        _, x, weight = made
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        weight = weight.detach()
        if self.weight_offset:
            weight = weight.to(torch.float32) + self.weight_offset
        return Origin(x.detach().reshape(-1, x.shape[-1]), rstd.reshape(-1).to(torch.float32), weight)


def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Compute the norm by its class, and note of what. Named as what it replaces, as in `linear`."""
    y: torch.Tensor = type(self).forward(self, x)
    normed: Normed = vars(self)[NORM_SLOT]
    if normed.used and torch.compiler.is_compiling():
        weight: Any = self.weight
        normed.made = (y, x, weight)
    return y


def watch_norm(module: nn.Module, eps: float, weight_offset: float) -> Normed:
    """Let a norm note what it computes from, in place, and return where; see `restore_norm`."""
    normed = Normed(eps, weight_offset)
    setattr(module, NORM_SLOT, normed)
    module.forward = types.MethodType(forward, module)
    return normed


def restore_norm(module: nn.Module) -> None:
    """Give a norm its own `forward` back."""
    if NORM_SLOT in vars(module):
        vars(module).pop("forward", None)
        vars(module).pop(NORM_SLOT)
