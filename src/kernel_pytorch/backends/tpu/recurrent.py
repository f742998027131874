# mypy: disable-error-code="no-untyped-call"
"""Recurrences as a traced step can have them: TorchTPU 0.2.0 runs LSTM and GRU by kernels without a gradient.

Its associative scan compiles what combines two elements there and then, which needs tensors with values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import decompositions
from torch._guards import detect_fake_mode
from torch._higher_order_ops.associative_scan import associative_scan, generic_associative_scan
from torch.utils import _pytree as pytree

__all__ = ["make_traceable"]

_RECURRENT: dict[str, Callable[..., Any]] = {
    "lstm.input": decompositions.lstm_impl,
    "lstm.data": decompositions.lstm_data_impl,
    "gru.input": decompositions.gru_impl,
    "gru.data": decompositions.gru_impl_data,
}
_SCAN = "_tpu_associative_scan"
"""What TorchTPU puts in the place of `torch.associative_scan`, in that function's globals."""

_registered: list[torch.library.Library] = []


def make_traceable() -> None:
    """Let recurrent layers be written out where gradients are recorded, and scans where tensors have no values.

    For this process, in which torch_tpu is loaded.
    """
    if _registered:
        return
    library = torch.library.Library("aten", "IMPL")
    for name, written_out in _RECURRENT.items():
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload)
        library.impl(name, _trained_by(written_out, operator), "AutogradPrivateUse1")
    _registered.append(library)
    known = associative_scan.__globals__
    known[_SCAN] = _traced_by(known[_SCAN])


def _trained_by(written_out: Callable[..., Any], operator: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return written_out(*args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():  # noqa: SLF001
            return operator(*args, **kwargs)

    return run


def _traced_by(scan: Callable[..., Any]) -> Callable[..., Any]:
    def run(combine: Callable[..., Any], xs: Any, dim: int, **options: Any) -> Any:
        leaves, spec = pytree.tree_flatten(xs)
        if detect_fake_mode(leaves) is None:
            return scan(combine, xs, dim, **options)
        if options.get("reverse", False):
            leaves = [leaf.flip(dim) for leaf in leaves]

        def flat(*both: torch.Tensor) -> Any:
            left, right = both[: len(leaves)], both[len(leaves) :]
            return combine(pytree.tree_unflatten(left, spec), pytree.tree_unflatten(right, spec))

        results = generic_associative_scan(flat, leaves, dim % leaves[0].dim())
        if options.get("reverse", False):
            results = [result.flip(dim) for result in results]
        return pytree.tree_unflatten(results, spec)

    return run
