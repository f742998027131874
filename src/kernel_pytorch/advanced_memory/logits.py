# mypy: disable-error-code="no-untyped-call"
"""Finds, while a loss runs, the linear layer whose logits a cross-entropy takes, and computes both chunk by chunk.

By behaviour, not by model: results of linear layers are followed through casts, views and slices of rows until a
`cross_entropy` takes one. What the layer computed is then used by nobody, and a compiler drops it. Followed are views
that leave the columns alone; anything else between them (a soft cap, a scale) ends the trail, and the loss runs as
written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from kernel_pytorch.advanced_memory.chunked_loss import chunked_cross_entropy

__all__ = ["ChunkedLogits"]

_CASTS = {torch.Tensor.float, torch.Tensor.double, torch.Tensor.to, torch.Tensor.contiguous, torch.Tensor.type}
_LINEAR = {functional.linear, torch._C._nn.linear}  # noqa: SLF001
_PRODUCTS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm}
_TURNS = {torch.t, torch.Tensor.t, torch.transpose, torch.Tensor.transpose}
_TURNED_VIEWS = {torch.Tensor.T.__get__, torch.Tensor.mT.__get__}  # type: ignore[attr-defined]
_SHAPES = {torch.Tensor.view, torch.Tensor.reshape, torch.reshape, torch.Tensor.flatten, torch.flatten}
_CROSS_ENTROPY = inspect.signature(functional.cross_entropy)


@dataclass(frozen=True, slots=True)
class _Logits:
    """What a tensor of logits was made of: rows of hidden states, weight and bias."""

    tensor: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


class ChunkedLogits(TorchFunctionMode):
    """While active, a mean or summed `F.cross_entropy` of a linear layer's result is computed by chunks of rows.

    Args:
        rows: Rows of a chunk.
        spread: Whether rows lie spread over devices; see `chunked_cross_entropy`.

    Attributes:
        replaced: How many losses were.
        passed: Why the last one that was not, was not; empty where all were.
        seen: Rows of the logits of each that was.
    """

    def __init__(self, rows: int, *, spread: bool = False) -> None:
        super().__init__()
        self.rows = rows
        self.spread = spread
        self.replaced = 0
        self.passed = ""
        self.seen: list[int] = []
        self._logits: dict[int, _Logits] = {}
        self._turned: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __exit__(self, *error: object) -> None:
        """Let go of what was followed."""
        super().__exit__(*error)
        self._logits.clear()
        self._turned.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if func is functional.cross_entropy:
            chunked = self._chunked(*args, **kwargs)
            if chunked is not None:
                return chunked
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            self._follow(func, args, kwargs, result)
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, result: torch.Tensor) -> None:
        if func in _TURNS or func in _TURNED_VIEWS:
            if args and isinstance(args[0], torch.Tensor) and args[0].dim() == 2:
                self._turned[id(result)] = (result, args[0])
            return
        if func in _LINEAR:
            hidden, weight, bias = _linear(*args, **kwargs)
            self._keep(result, hidden, weight, bias)
        elif func in _PRODUCTS and len(args) == 2 and id(args[1]) in self._turned:
            self._keep(result, args[0], self._turned[id(args[1])][1], None)
        elif args and id(args[0]) in self._logits:
            known = self._logits[id(args[0])]
            hidden_rows = _same_rows(func, args, kwargs, known, result)
            if hidden_rows is not None:
                self._keep(result, hidden_rows, known.weight, known.bias)

    def _keep(self, result: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: Any) -> None:
        if weight.dim() != 2 or result.dim() < 2:
            return
        if result.dtype != hidden.dtype and torch.is_autocast_enabled(hidden.device.type):
            hidden, weight = hidden.to(result.dtype), weight.to(result.dtype)
            bias = None if bias is None else bias.to(result.dtype)
        self._logits[id(result)] = _Logits(result, hidden, weight, bias)

    def _chunked(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        given = _CROSS_ENTROPY.bind(*args, **kwargs)
        given.apply_defaults()
        values = given.arguments
        logits, labels = values["input"], values["target"]
        known = self._logits.get(id(logits))
        why = _unfit(known, logits, labels, values)
        if known is None or why:
            self.passed = why
            return None
        self.replaced += 1
        self.seen.append(logits.shape[0])
        return chunked_cross_entropy(
            known.hidden,
            known.weight,
            labels,
            bias=known.bias,
            rows=self.rows,
            spread=self.spread,
            ignore_index=values["ignore_index"],
            label_smoothing=values["label_smoothing"],
            reduction=values["reduction"],
        )


def _unfit(known: _Logits | None, logits: torch.Tensor, labels: torch.Tensor, values: dict[str, Any]) -> str:
    if known is None:
        return "what the cross-entropy takes is no linear layer's result, or was changed since"
    if logits.dim() != 2 or labels.dim() != 1 or labels.is_floating_point():
        return "the cross-entropy takes other than rows of logits and class indices"
    if values["weight"] is not None or values["reduction"] not in ("mean", "sum"):
        return "the cross-entropy weighs classes, or returns a loss for each row"
    if values["size_average"] is not None or values["reduce"] is not None:
        return "the cross-entropy is called with deprecated arguments"
    same = known.hidden.dtype == known.weight.dtype and (known.bias is None or known.bias.dtype == known.weight.dtype)
    return "" if same else "hidden states and weight have two dtypes"


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    return input, weight, bias


def _same_rows(
    func: Callable[..., Any], args: Any, kwargs: Any, known: _Logits, result: torch.Tensor
) -> torch.Tensor | None:
    """Return the hidden states of the rows that a view of logits shows; `None` where it is no such view."""
    columns, width = known.tensor.shape[-1], known.hidden.shape[-1]
    if func in _CASTS:
        floating = result.shape == known.tensor.shape and result.is_floating_point()
        return known.hidden if floating and result.dtype.itemsize >= known.tensor.dtype.itemsize else None
    if not result.dim() or result.shape[-1] != columns:
        return None
    if func in _SHAPES:
        return known.hidden.reshape(*result.shape[:-1], width)
    if func is torch.Tensor.__getitem__:
        return known.hidden[args[1]] if _takes_rows(args[1], known.tensor.dim()) else None
    del kwargs
    return None


def _takes_rows(index: Any, dim: int) -> bool:
    """Say whether an index of logits takes slices and single entries of leading dimensions alone."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(isinstance(part, slice | int) or part is Ellipsis for part in parts):
        return False
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (dim - len(parts) + 1)
    return len(parts) < dim or parts[-1] == slice(None)
