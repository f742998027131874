"""Gradients of a loss for every parameter, and what they may differ by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from kernel_pytorch.core.types import Check, Gate
from kernel_pytorch.validation.compare import tensor_error
from kernel_pytorch.validation.subject import attempt, seeded

__all__ = ["Gradients", "gradient_checks", "gradients_of", "measurable"]


@dataclass(slots=True)
class Gradients:
    """Loss and gradient by parameter name; `error` is what the backward raised."""

    loss: float = math.nan
    by_name: dict[str, torch.Tensor] = field(default_factory=dict)
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values that `torch.load(weights_only=True)` reads back."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def gradients_of(model: nn.Module, loss: Callable[[Any, Any], torch.Tensor], batch: Any, seed: int) -> Gradients:
    """Run one forward and backward and return the gradients; those the model held before are dropped."""
    model.zero_grad(set_to_none=True)

    def step() -> torch.Tensor:
        value = loss(model, batch)
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    with seeded(seed), torch.enable_grad():
        value, error = attempt(step)
    found = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Gradients(math.nan if error else float(value), found, error)


def measurable(want: Gradients, floor: float) -> dict[str, torch.Tensor]:
    """Return the gradients that are not zero up to rounding.

    A parameter counts where the root mean square of its true gradient is above `floor` times that of all: the gradient
    of an attention's `key.bias` is zero by mathematics, and what is computed for it is noise.
    """
    total = sum(float(g.abs().double().square().sum()) for g in want.by_name.values())
    count = sum(g.numel() for g in want.by_name.values())
    scale = math.sqrt(total / count) if count else 0.0
    return {n: g for n, g in want.by_name.items() if g.numel() and _rms(g) > floor * scale}


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.abs().double().square().mean().sqrt())


def gradient_checks(
    got: Gradients,
    want: Gradients,
    *,
    gate: Gate,
    floor: float,
    budget: float,
    budgets: Mapping[str, float] | None = None,
    whole: bool = False,
    case: str = "",
) -> list[Check]:
    """Compare loss and gradients with the oracle's.

    Args:
        got: The candidate's.
        want: The oracle's.
        gate: Goes into the checks.
        floor: See `measurable`.
        budget: Allowed error of a parameter that `budgets` does not name.
        budgets: Allowed error by parameter.
        whole: Compare each gradient as one vector, not by its worst row.
        case: Goes into the checks.
    """
    if got.error:
        return [Check("gradients", gate, math.inf, 0.0, f"the training step raises {got.error}", case)]
    if want.error:
        return []
    loss = abs(got.loss - want.loss) / max(abs(want.loss), 1e-12)
    allowed = (budgets or {}).get("loss", budget)
    checks = [Check("loss", gate, loss, allowed, f"differs by {loss:.2g}" if not loss <= allowed else "", case)]
    lost = sorted(want.by_name.keys() - got.by_name.keys())
    if lost:
        checks.append(Check(f"grad {lost[0]}", gate, math.inf, 0.0, "has no gradient; the reference has one", case))
    for name, true in measurable(want, floor).items():
        mine = got.by_name.get(name)
        if mine is None:
            continue
        if mine.shape != true.shape:
            checks.append(Check(f"grad {name}", gate, math.inf, 0.0, f"has shape {tuple(mine.shape)}", case))
            continue
        error = tensor_error(mine.flatten(), true.flatten()) if whole else tensor_error(mine, true)
        allowed = (budgets or {}).get(name, budget)
        detail = f"differs by {error.row:.2g}" if not error.row <= allowed else ""
        checks.append(Check(f"grad {name}", gate, error.row, allowed, detail, case))
    return checks
