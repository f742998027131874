"""Which modules are an RMSNorm, seen by running them beside the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kernel_pytorch.ops.gated_mlp.matching import agree

__all__ = ["rms_norm_options"]


def rms_norm_options(module: nn.Module, norm: Callable[..., Any]) -> dict[str, Any] | None:
    """Return `eps`, `weight_offset` and `round_before_weight` with which `norm` computes what an RMSNorm does.

    Rows near the size of `eps` are among the inputs, so a wrong `eps` shows; bfloat16 tells the order of the casts. A
    module without an `eps` of its own, which then depends on the dtype, is none of these.
    """
    import copy

    weights = dict(module.named_parameters())
    named = any(name in type(module).__name__ for name in ("RMSNorm", "RmsNorm", "T5LayerNorm"))
    shape = getattr(weights.get("weight"), "shape", ())
    if not named or list(weights) != ["weight"] or len(shape) != 1 or any(True for _ in module.children()):
        return None
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator)
    rows = torch.randn((64, *shape), generator=generator) * torch.logspace(-4, 1, 64)[:, None]
    options: dict[str, Any] | None = None
    try:
        with torch.no_grad():
            wide: Any = copy.deepcopy(module).to("cpu", torch.float32)
            narrow: Any = copy.deepcopy(module).to("cpu", torch.bfloat16)
            wide.weight.copy_(values)
            narrow.weight.copy_(values)
            found = [getattr(module, name, None) for name in ("eps", "variance_epsilon", "epsilon", "norm_eps")]
            for eps in [float(value) for value in found if isinstance(value, (int, float))]:
                for offset in (0.0, 1.0):
                    if options is None and agree(wide(rows), norm(rows, wide.weight, eps, weight_offset=offset), 1e-5):
                        options = {"eps": eps, "weight_offset": offset}
            if options is None:
                return None
            small = rows.bfloat16()
            got = narrow(small)
            moved = {}
            for first in (False, True):
                want = norm(small, narrow.weight, round_before_weight=first, **options)
                if agree(got, want, 1e-2):
                    moved[first] = float((got != want).double().mean())
    except (TypeError, ValueError, RuntimeError):
        return None
    best = min(moved, key=lambda first: moved[first], default=None)
    return None if best is None or moved[best] > 0.02 else options | {"round_before_weight": best}
