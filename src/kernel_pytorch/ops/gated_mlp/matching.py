"""Which modules compute a gated MLP, seen by running them beside the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["agree", "gated_mlp_options"]


def agree(got: Any, want: torch.Tensor, tolerance: float) -> bool:
    """Return whether a result is a tensor of the shape and dtype of `want` and within a relative error of it."""
    if not isinstance(got, torch.Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return False
    difference = (got.double() - want.double()).norm()
    return bool(difference <= tolerance * want.double().norm())


def gated_mlp_options(module: nn.Module, gated: Callable[..., Any]) -> dict[str, Any] | None:
    """Return the names of the projections and the activation of `down(activation(gate(x)) * up(x))`."""
    import inspect

    children = dict(module.named_children())
    names = next((n for n in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")) if {*n} <= {*children}), None)
    if names is None or len(inspect.signature(module.forward).parameters) != 1:
        return None
    gate, up, down = (children.pop(name) for name in names)
    weight = getattr(gate, "weight", None)
    active = [c for c in children.values() if any(True for _ in c.parameters()) or isinstance(c, nn.Dropout)]
    if active or not isinstance(gate, nn.Linear) or weight is None or not weight.is_floating_point():
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((4, gate.in_features), generator=generator).to(weight.device, weight.dtype)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 4e-3}.get(weight.dtype, 1e-5)
    try:
        with torch.no_grad():
            # Gates of order one, whatever the initialisation, so that the activations differ.
            x = x / gate(x).double().std().clamp_min(1e-12).to(x.dtype)
            want = module(x)
            errors = {}
            for activation in ("silu", "gelu", "gelu_tanh"):
                got = down(gated(gate(x), up(x), activation))
                if agree(got, want, tolerance):
                    errors[activation] = float((got.double() - want.double()).norm())
    except (TypeError, ValueError, RuntimeError):
        return None
    best = min(errors, key=lambda name: errors[name], default=None)
    # In bfloat16 the two forms of GELU are one; a module that names its activation settles it.
    named = "tanh" in (type(getattr(module, "act_fn", None)).__name__ + str(getattr(module, "act_fn", ""))).lower()
    if best in ("gelu", "gelu_tanh") and len(errors) > 1:
        best = "gelu_tanh" if named or "new" in str(getattr(module, "act_fn", "")).lower() else "gelu"
    return None if best is None else {"names": names, "activation": best}
