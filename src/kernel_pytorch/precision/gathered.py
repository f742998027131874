# mypy: disable-error-code="no-untyped-call"
"""A weight in FP8 as FSDP2 gathered it, and what layers take of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from kernel_pytorch.ops.float8_cast import Float8Matrix, padded

__all__ = ["GatheredWeight", "gathered", "turned"]

aten = torch.ops.aten


class GatheredWeight(torch.Tensor):
    """A whole weight in FP8, as FSDP gathered it: `bits` are the values times a scale, `back` turns them back."""

    @staticmethod
    def __new__(  # noqa: D102
        cls: type[GatheredWeight], bits: torch.Tensor, inverse: torch.Tensor, kind: torch.dtype, dtype: torch.dtype
    ) -> GatheredWeight:
        del inverse, kind
        return torch.Tensor._make_wrapper_subclass(  # noqa: SLF001
            cls, bits.size(), strides=bits.stride(), dtype=dtype, device=bits.device
        )

    def __init__(self, bits: torch.Tensor, inverse: torch.Tensor, kind: torch.dtype, dtype: torch.dtype) -> None:
        self.bits, self.back, self.kind = bits, inverse, kind
        del dtype

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GatheredWeight({self.bits.view(self.kind)!r}, {self.back})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Detach and alias, as FSDP does; any other operator runs on the values, in the weight's own format."""
        del types
        held = args[0]
        same = func is aten.as_strided.default and tuple(args[1]) == held.shape and tuple(args[2]) == held.stride()
        if same or func in (aten.detach.default, aten.alias.default):
            return cls(held.bits, held.back, held.kind, held.dtype)
        plain = pytree.tree_map_only(GatheredWeight, lambda x: x.whole(), (args, kwargs or {}))
        return func(*plain[0], **plain[1])

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """Return the names of the inner tensors, and the rest."""
        return ["bits", "back"], (self.kind, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], rest: Any, size: Any, stride: Any) -> GatheredWeight:
        """Make the weight again of its inner tensors."""
        del size, stride
        return GatheredWeight(inner["bits"], inner["back"], *rest)

    def whole(self) -> torch.Tensor:
        """Return what the bits stand for, in the weight's own format."""
        return (self.bits.view(self.kind).float() * self.back).to(self.dtype)


def gathered(weights: list[torch.Tensor]) -> Float8Matrix | None:
    """Return weights that FSDP gathered, below each other, without a transposed copy; `None` of any others."""
    held = [w.data if isinstance(w, nn.Parameter) else w for w in weights]
    if not all(isinstance(w, GatheredWeight) for w in held):
        return None
    bits = torch.cat([w.bits for w in held]) if len(held) > 1 else held[0].bits  # type: ignore[attr-defined]
    row, inverse = bits.view(held[0].kind), held[0].back.reshape(1)  # type: ignore[attr-defined]
    return Float8Matrix(row, row.new_empty((0,)), inverse, inverse)


def turned(row: torch.Tensor) -> torch.Tensor:
    """Return the transposed copy of a matrix in FP8, zero beyond its rows."""
    bits = row.view(torch.uint8).t()
    return nn.functional.pad(bits, (0, padded(len(row)) - len(row))).contiguous().view(row.dtype)
