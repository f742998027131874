"""Statistical tests of what draws random numbers, on what ships: does it vary still, as much, around the same mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from kernel_pytorch.core.program import clone_call
from kernel_pytorch.core.types import Check, Gate, Mode
from kernel_pytorch.core.workload import Call
from kernel_pytorch.validation.compare import flatten
from kernel_pytorch.validation.subject import attempt, run

__all__ = ["draws", "randomness_checks"]

_SEEDS = 16
_ELEMENTS = 1 << 18
_MEAN_LIMIT = 25.0
"""Squared distance of the means in units of its expectation: five standard deviations for a single element."""


def draws(model: nn.Module, call: Call, mode: Mode, seed: int) -> torch.Tensor:
    """Return the float outputs of a call under 16 random seeds, flattened: `[seeds, elements]`, fp64.

    Raises:
        RuntimeError: The model raises, with what.
    """
    rows = []
    for i in range(_SEEDS):
        out, error = attempt(lambda i=i: run(model, clone_call(call), mode, seed + 7919 * (i + 1)))  # type: ignore[misc]
        if error:
            raise RuntimeError(error)
        parts = [t.double().flatten() for t in flatten(out).tensors.values() if t.is_floating_point()]
        rows.append(torch.cat([p.cpu() for p in parts])[:_ELEMENTS] if parts else torch.zeros(0))
    return torch.stack(rows)


def _log_ratio(got: torch.Tensor, want: torch.Tensor, keep: Sequence[int]) -> float:
    mine, theirs = (float(t[list(keep)].var(0).sum()) for t in (got, want))
    return math.log(mine / theirs)


def randomness_checks(got: torch.Tensor, want: torch.Tensor, case: str, *, tolerance: float) -> list[Check]:
    """Compare what two models give under several random seeds.

    Args:
        got: The candidate's, from `draws`.
        want: The unmodified model's, from `draws`.
        case: Goes into the checks.
        tolerance: Relative error that rounding may cause.
    """
    spread = float(want.var(0).sum())
    if got.shape != want.shape or not want.numel() or spread <= 1e-24 * float(want.square().mean(0).sum()):
        return []
    if float(got.var(0).sum()) <= 1e-3 * spread:
        detail = "the output no longer varies with the random seed; the reference's does"
        return [Check("randomness", Gate.CONTRACT, math.inf, 0.0, detail, case)]
    every = list(range(_SEEDS))
    ratio = _log_ratio(got, want, every)
    jackknife = [_log_ratio(got, want, [j for j in every if j != i]) for i in every]
    deviation = math.sqrt((_SEEDS - 1) / _SEEDS * sum((x - ratio) ** 2 for x in jackknife))
    limit = 0.1 + 5.0 * deviation
    detail = f"the variance over seeds is {math.exp(ratio):.2f} times the reference's" if abs(ratio) > limit else ""
    checks = [Check("random variance (log ratio)", Gate.CONTRACT, abs(ratio), limit, detail, case)]
    apart = float((got.mean(0) - want.mean(0)).square().sum())
    expected = float((got.var(0) + want.var(0)).sum()) / _SEEDS + float((tolerance * want.mean(0)).square().sum())
    distance = apart / expected
    detail = "the mean over random seeds differs from the reference's" if distance > _MEAN_LIMIT else ""
    checks.append(Check("random mean (chi-square)", Gate.CONTRACT, distance, _MEAN_LIMIT, detail, case))
    return checks
