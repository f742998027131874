"""Optimizer steps fed the same gradients on both sides: what an update changes by itself, apart from the gradients.

A loss curve hides a small error of the update behind that of the gradients; given equal gradients the updates of a
faithful optimizer differ by rounding only, so this is near-exact whatever precision the model computes in.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from kernel_pytorch.core.describe import make_optimizer
from kernel_pytorch.core.program import clone_model
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import Check, Gate
from kernel_pytorch.validation.gradients import Gradients
from kernel_pytorch.validation.subject import Subject, attempt

__all__ = ["update_check"]

_REORDERED = 1e-3
"""Of an update: PyTorch's own fused and looped AdamW differ by 1e-6."""
_ULPS = 1.0
"""Rounding units of the parameter allowed for each step: both sides round it once."""
_NEAR_ZERO = 0.1
"""Rows that move less than this share of the typical row are compared with it."""


def update_check(
    subject: Subject, program: Program, gradients: Gradients, *, steps: int, name: str, case: str
) -> Check | str:
    """Return the check of a few optimizer steps, or in words why there is nothing to compare.

    Args:
        subject: Where the unmodified model and its optimizer come from.
        program: The candidate; its parameters and optimizer are put back.
        gradients: Fed to both, scaled otherwise at each step.
        steps: How many.
        name: Of the check.
        case: Goes into the check.

    Returns:
        The largest difference of a row (last dimension) of a parameter, in units of what rounding explains.
    """
    theirs = clone_model(subject.reference)
    before = {n: p.detach().clone() for n, p in theirs.named_parameters()}
    mine = dict(program.model.named_parameters())
    if any(n not in mine or mine[n].dtype is not p.dtype for n, p in before.items()):
        return f"{name}: the candidate keeps its parameters in another format"
    if refused := _stepped(theirs, make_optimizer(subject.workload, theirs.parameters()), gradients, steps):
        return f"{name} given the same gradients: the unmodified optimizer raises {refused}"
    optimizer = program.optimizer or make_optimizer(subject.workload, program.model.parameters())
    held = {n: p.detach().clone() for n, p in mine.items()}
    state = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        for n, p in before.items():
            mine[n].copy_(p)
    error = _stepped(program.model, optimizer, gradients, steps)
    worst, where = 0.0, ""
    for n, want in theirs.named_parameters():
        if not error:
            ratio = _ratio(mine[n].detach(), want.detach(), before[n], steps)
            worst, where = (ratio, n) if not ratio <= worst else (worst, where)
    with torch.no_grad():
        for n, p in held.items():
            mine[n].copy_(p)
    optimizer.load_state_dict(state)
    if error:
        return Check(name, Gate.TRAINING, math.inf, 1.0, f"the optimizer raises {error}", case)
    detail = f"given the same gradients, {where} moves otherwise: {worst:.2g} times rounding" if not worst <= 1 else ""
    return Check(name, Gate.TRAINING, worst, 1.0, detail, case)


def _ratio(got: torch.Tensor, want: torch.Tensor, before: torch.Tensor, steps: int) -> float:
    if not want.numel() or not (want.is_floating_point() or want.is_complex()):
        return 0.0

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        plain = torch.view_as_real(tensor).flatten(-2) if tensor.is_complex() else tensor
        wide = plain.reshape(1, -1) if plain.dim() < 2 else plain.reshape(-1, plain.shape[-1])
        return wide.to(torch.float64 if wide.dtype is torch.float64 else torch.float32)

    off = (rows(got) - rows(want)).norm(dim=1)
    moved = (rows(want) - rows(before)).norm(dim=1)
    typical = moved.square().mean().sqrt()
    ulp = steps * _ULPS * torch.finfo(want.dtype).eps
    allowed = _REORDERED * moved.clamp(min=float(typical) * _NEAR_ZERO) + ulp * rows(before).norm(dim=1)
    ratio = torch.where(off == 0, torch.zeros_like(off), off / allowed)
    return float(ratio.cpu().nan_to_num(math.inf).max())  # XLA takes no infinity here


def _stepped(model: nn.Module, optimizer: torch.optim.Optimizer, gradients: Gradients, steps: int) -> str:
    error = ""
    for i in range(steps):
        for name, parameter in model.named_parameters():
            given = gradients.by_name.get(name) if parameter.requires_grad else None
            parameter.grad = None if given is None else (given * (1.0 + i)).to(parameter.dtype)
        _, failed = attempt(optimizer.step)
        error = error or failed
    optimizer.zero_grad(set_to_none=True)
    return error
