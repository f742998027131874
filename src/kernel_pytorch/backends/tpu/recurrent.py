# mypy: disable-error-code="no-untyped-call"
"""Recurrent layers that can be trained: TorchTPU 0.2.0 runs LSTM and GRU by kernels without a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import decompositions

__all__ = ["make_differentiable"]

_RECURRENT: dict[str, Callable[..., Any]] = {
    "lstm.input": decompositions.lstm_impl,
    "lstm.data": decompositions.lstm_data_impl,
    "gru.input": decompositions.gru_impl,
    "gru.data": decompositions.gru_impl_data,
}

_registered: list[torch.library.Library] = []


def make_differentiable() -> None:
    """Let LSTM and GRU of this process be written out, time step by time step, where gradients are recorded."""
    if _registered:
        return
    library = torch.library.Library("aten", "IMPL")
    for name, written_out in _RECURRENT.items():
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload)
        library.impl(name, _trained_by(written_out, operator), "AutogradPrivateUse1")
    _registered.append(library)


def _trained_by(written_out: Callable[..., Any], operator: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return written_out(*args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():  # noqa: SLF001
            return operator(*args, **kwargs)

    return run
