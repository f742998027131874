"""Run a model in fp64 although its code casts to fp32 inside (38 of 184 operators of a Llama do)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["QuantisationWatch", "lift_tree", "lifted", "lifted_model"]

_LOW = (torch.float32, torch.float16, torch.bfloat16)
_COMPLEX_LOW = (torch.complex64, torch.complex32)
_ROUNDS = ("aten::round", "aten::fake_quantize")
_EIGHT_BITS = frozenset(
    getattr(torch, name) for name in (
        "int8", "uint8", "qint8", "quint8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    )
)  # fmt: skip
_BITS = frozenset({"aten::view.dtype"})


def _wide(dtype: torch.dtype) -> torch.dtype:
    if dtype in _LOW:
        return torch.float64
    return torch.complex128 if dtype in _COMPLEX_LOW else dtype


def _wide_tensor(tensor: torch.Tensor) -> torch.Tensor:
    wide = _wide(tensor.dtype)
    return tensor if wide is tensor.dtype else tensor.to(wide)


class _Lift(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces every low-precision float dtype an operator is asked for by fp64, and mixed arguments by wide ones."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.name() in _BITS:
            return func(*args, **kwargs)
        schema = func._schema.arguments  # noqa: SLF001
        written = {a.name for a in schema if a.alias_info is not None and a.alias_info.is_write}
        names = [a.name for a in schema]
        leaves = pytree.tree_leaves((args, kwargs))
        mixed = any(isinstance(x, torch.Tensor) and x.dtype in (torch.float64, torch.complex128) for x in leaves)

        def widen(leaf: Any) -> Any:
            if isinstance(leaf, torch.dtype):
                return _wide(leaf)
            if mixed and isinstance(leaf, torch.Tensor):
                return _wide_tensor(leaf)
            return leaf

        args = tuple(
            a if i < len(names) and names[i] in written else pytree.tree_map(widen, a) for i, a in enumerate(args)
        )
        kwargs = {k: v if k in written else pytree.tree_map(widen, v) for k, v in kwargs.items()}
        return func(*args, **kwargs)


def _any_tensor(tree: Any, matches: Callable[[torch.Tensor], bool]) -> bool:
    return any(isinstance(x, torch.Tensor) and matches(x) for x in pytree.tree_leaves(tree))


class QuantisationWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether floats are rounded to integers or to 8-bit floats, which lifting does not undo.

    Attributes:
        seen: Whether one was.
    """

    seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.name() not in _BITS and _any_tensor((args, kwargs), lambda x: x.is_floating_point()):
            self.seen |= func.name().startswith(_ROUNDS) or _any_tensor(out, lambda x: x.dtype in _EIGHT_BITS)
        return out


@contextmanager
def lifted(*, hard_casts: bool = True) -> Iterator[None]:
    """Make fp64 the default dtype and, with `hard_casts`, turn casts to lower float dtypes into casts to fp64.

    Args:
        hard_casts: False for compiled code, which does not run under a dispatch mode.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        if hard_casts:
            with _Lift():  # type: ignore[no-untyped-call]
                yield
        else:
            yield
    finally:
        torch.set_default_dtype(before)


def lifted_model(model: nn.Module) -> nn.Module:
    """Turn every floating-point and complex parameter and buffer of a model into fp64, in place; ties are kept."""
    apply: Callable[..., nn.Module] = model._apply  # noqa: SLF001
    return apply(_wide_tensor)


def lift_tree(tree: Any) -> Any:
    """Return a tree of inputs with floats as fp64 (copies, with `requires_grad` kept)."""

    def widen(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.is_nested:
            return leaf
        return _wide_tensor(leaf.detach()).clone().requires_grad_(leaf.requires_grad)

    return pytree.tree_map(widen, tree)
