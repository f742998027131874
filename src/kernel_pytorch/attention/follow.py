# mypy: disable-error-code="no-untyped-call"
"""Follows attention that a model writes out (`softmax(q @ k.T * scale + mask) @ v`) while it runs, and says what it is.

By behaviour, not by model: a product of two tensors is followed through scaling, masking, casts and a softmax over its
last dimension until it is multiplied by a third tensor. A mask is read where its values follow from constants (`tril`
of ones, comparisons of `arange`s): it is computed a second time, for real, on the CPU. For tracers, whose tensors have
no values and whose dead code costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from kernel_pytorch.errors import CandidateError

__all__ = ["AttentionFollower", "Followed", "Written"]

_MATMUL = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm}
_TRANSPOSE = {torch.transpose, torch.Tensor.transpose}
_TURNED = {torch.Tensor.mT.__get__}  # type: ignore[attr-defined]
_TIMES = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}
_OVER = {torch.div, torch.Tensor.div, torch.Tensor.__truediv__}
_PLUS = {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__}
_FILL = {torch.masked_fill, torch.Tensor.masked_fill}
_CAST = {torch.Tensor.float, torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.bfloat16, torch.Tensor.half}
_SOFTMAX = {torch.softmax, torch.Tensor.softmax, functional.softmax}
_DROPOUT = {functional.dropout, torch.dropout}
_MOST_CONSTANT = 1 << 26
_LOWEST = -1e30


@dataclass(frozen=True, slots=True)
class Written:
    """Attention as far as it was written: scores, or (with `probabilities`) their softmax.

    Attributes:
        query: `[..., rows, width]`.
        key: `[..., columns, width]`.
        scale: Factor of the scores.
        allowed: Where a score counts, `[rows, columns]`; `None` is everywhere.
        probabilities: Whether the softmax was taken.
        result: The tensor that holds them, which keeps its identity from being taken over.
    """

    query: torch.Tensor
    key: torch.Tensor
    scale: float
    allowed: np.ndarray[Any, np.dtype[np.bool_]] | None
    probabilities: bool
    result: torch.Tensor

    @property
    def causal(self) -> bool | None:
        """Whether the mask is the lower triangle of a square; `None` where it is neither that nor everything."""
        mask = self.allowed
        if mask is None or bool(mask.all()):
            return False
        square = mask.ndim == 2 and mask.shape[0] == mask.shape[1]
        return True if square and np.array_equal(mask, np.tri(len(mask), dtype=bool)) else None


class AttentionFollower(TorchFunctionMode):
    """While active, hands attention to `attend`, whether it is called or written out.

    Args:
        attend: `attend(query, key, value, is_causal, scale)` returns `softmax(query @ key.T * scale) @ value`, or
            `None` where it does not take these.

    Attributes:
        replaced: How many were handed over.
        passed: Why the last one that was not, was not.
    """

    def __init__(self, attend: Callable[..., torch.Tensor | None]) -> None:
        super().__init__()
        self.attend = attend
        self.replaced = 0
        self.passed = ""
        self._written: dict[int, Written] = {}
        self._turned: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._constants: dict[int, tuple[torch.Tensor, Any]] = {}

    def __exit__(self, *error: object) -> None:
        """Let go of what was followed."""
        super().__exit__(*error)
        for kept in (self._written, self._turned, self._constants):
            kept.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            handed = self._called(*args, **kwargs)
            if handed is not None:
                return handed
        elif func in _MATMUL and len(args) == 2 and id(args[0]) in self._written:
            handed = self._ended(self._written[id(args[0])], args[1])
            if handed is not None:
                return handed
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            self._follow(func, args, kwargs, result)
        return result

    def _called(  # noqa: PLR0917
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002
        scale: float | None = None,
        enable_gqa: bool = False,  # noqa: FBT001, FBT002
    ) -> torch.Tensor | None:
        causal: bool | None = is_causal
        if attn_mask is not None:
            mask = self._mask_of(attn_mask)
            known = mask is not None and mask.dtype == np.bool_
            causal = Written(query, key, 1.0, mask, probabilities=False, result=query).causal if known else None
        if causal is None:
            self.passed = "the mask is not the causal one"
            return None
        if dropout_p:
            self.passed = "attention weights are dropped out"
            return None
        if enable_gqa and key.shape[-3] != query.shape[-3]:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        return self._hand(query, key, value, causal, scale if scale is not None else query.shape[-1] ** -0.5)

    def _ended(self, written: Written, value: torch.Tensor) -> torch.Tensor | None:
        if not written.probabilities:
            return None
        causal = written.causal
        if causal is None:
            self.passed = "the mask is not the causal one"
            return None
        return self._hand(written.query, written.key, value, causal, written.scale)

    def _hand(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        causal: bool,  # noqa: FBT001
        scale: float,
    ) -> torch.Tensor | None:
        result = self.attend(query, key, value, causal, scale)
        if result is None:
            self.passed = f"shapes {tuple(query.shape)}, {tuple(key.shape)} are not taken"
        else:
            self.replaced += 1
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, result: torch.Tensor) -> None:
        first: Any = args[0] if args else None
        written = self._written.get(id(first))
        if func in _TURNED or (func in _TRANSPOSE and _last_two(first.dim(), *args[1:3])):
            self._turned[id(result)] = (result, first)
        elif func in _MATMUL and len(args) == 2 and id(args[1]) in self._turned:
            key = self._turned[id(args[1])][1]
            if first.dim() >= 3 and key.dim() == first.dim():
                self._written[id(result)] = Written(first, key, 1.0, None, probabilities=False, result=result)
        elif written is not None:
            self._move_on(func, args, kwargs, written, result)
        self._compute(func, args, kwargs, result)

    def _move_on(self, func: Any, args: Any, kwargs: Any, written: Written, result: torch.Tensor) -> None:
        after = _after(func, args, kwargs, written, self._mask_of)
        if after is not None and result.shape == written.result.shape:
            self._written[id(result)] = replace(after, result=result)

    def _mask_of(self, tensor: Any) -> Any:
        """Return the values of a tensor that follows from constants, without leading ones; else `None`."""
        known = self._constants.get(id(tensor))
        if known is None:
            return None
        mask = known[1]
        while mask.ndim > 2 and mask.shape[0] == 1:
            mask = mask[0]
        return mask

    def _compute(self, func: Any, args: Any, kwargs: Any, result: torch.Tensor) -> None:
        """Compute a tensor that follows from constants alone a second time, on the CPU."""
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        if func not in _CONSTANT or result.numel() > _MOST_CONSTANT:
            return
        if not all(id(t) in self._constants for t in tensors):
            return
        with torch._C.DisableTorchFunction(), _disable_current_modes():  # noqa: SLF001
            known = [torch.from_numpy(self._constants[id(x)][1]) if isinstance(x, torch.Tensor) else x for x in leaves]
            own_args, own_kwargs = pytree.tree_unflatten(known, spec)
            if "device" in own_kwargs:
                own_kwargs["device"] = "cpu"
            value = func(*own_args, **own_kwargs)
            self._constants[id(result)] = (
                result,
                value.float().numpy() if value.is_floating_point() else value.numpy(),
            )


class Followed:
    """A call under an `AttentionFollower`, which must find attention to hand over.

    Args:
        call: The model's call.
        attend: As `AttentionFollower` takes it.
        name: What asks, for the error.
    """

    def __init__(self, call: Callable[..., Any], attend: Callable[..., torch.Tensor | None], name: str) -> None:
        self.call = call
        self.attend = attend
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        Raises:
            CandidateError: There was no attention to hand over, with the reason.
        """
        mode = AttentionFollower(self.attend)
        with mode:
            result = self.call(*args, **kwargs)
        if not mode.replaced:
            raise CandidateError(f"{self.name}: {mode.passed or 'the model computes no attention'}")
        return result


_CONSTANT = {
    torch.ones, torch.zeros, torch.full, torch.arange, torch.tril, torch.triu, torch.Tensor.tril, torch.Tensor.triu,
    torch.Tensor.__invert__, torch.bitwise_not, torch.logical_not, torch.Tensor.logical_not, torch.Tensor.bool,
    torch.Tensor.to, torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.unsqueeze, torch.unsqueeze,
    torch.Tensor.__getitem__, torch.Tensor.expand, torch.Tensor.masked_fill, torch.masked_fill, torch.where,
    torch.Tensor.__eq__, torch.Tensor.eq, torch.Tensor.le, torch.Tensor.ge, torch.Tensor.lt, torch.Tensor.gt,
    torch.Tensor.__and__, torch.Tensor.__or__, torch.logical_and, torch.logical_or,
}  # fmt: skip


def _last_two(dim: int, first: int, second: int) -> bool:
    return {first % dim, second % dim} == {dim - 1, dim - 2}


def _after(func: Any, args: Any, kwargs: Any, written: Written, mask_of: Callable[[Any], Any]) -> Written | None:
    """Return what attention has become after one more operator; `None` where it is none that attention has."""
    if func in _CAST:
        return written
    if func in _DROPOUT:
        off = kwargs.get("training", args[2] if len(args) > 2 else True) is False or kwargs.get("p", args[1:2]) == 0.0
        return written if off and written.probabilities else None
    if written.probabilities:
        return None
    if func in _SOFTMAX:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        return replace(written, probabilities=True) if dim in (-1, written.result.dim() - 1) else None
    return _scaled(func, args, written) or _masked(func, args, written, mask_of)


def _scaled(func: Any, args: Any, written: Written) -> Written | None:
    other = args[1] if len(args) > 1 else None
    if not isinstance(other, int | float) or isinstance(other, bool) or written.allowed is not None:
        return None
    if func in _TIMES:
        return replace(written, scale=written.scale * float(other))
    return replace(written, scale=written.scale / float(other)) if func in _OVER else None


def _masked(func: Any, args: Any, written: Written, mask_of: Callable[[Any], Any]) -> Written | None:
    mask = mask_of(args[1]) if len(args) > 1 else None
    if mask is None or mask.shape != written.result.shape[-2:]:
        return None
    allowed = None
    if func in _FILL and len(args) > 2 and isinstance(args[2], int | float) and args[2] <= _LOWEST:
        allowed = ~mask.astype(bool)
    elif func in _PLUS and bool(((mask == 0) | (mask <= _LOWEST)).all()):
        allowed = mask == 0
    if allowed is None:
        return None
    return replace(written, allowed=allowed if written.allowed is None else written.allowed & allowed)
