"""Gate 4: the error of what ships against the fp64 oracle, within what the declared precision costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kernel_pytorch import catalog
from kernel_pytorch.core.types import Check, Gate, Step
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.validation.compare import Error, Flat, compare_values
from kernel_pytorch.validation.oracle import Emulation, Oracle
from kernel_pytorch.validation.subject import Observed

__all__ = ["Budgets", "budgets", "declared_dtype", "emulation", "precision_checks"]

_NAMES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
}
_REORDERED = 20.0
"""Reordering (Winograd, split sums) may cost this many times the fp32 reference's own error."""
_CAST = 2.0
"""A faithful implementation of a format costs at most this many times what plain casting costs."""


@dataclass(frozen=True, slots=True)
class Budgets:
    """What one output leaf may differ from the oracle, by path, and the unmodified model's own error."""

    allowed: Mapping[str, float]
    own: Mapping[str, float]


def declared_dtype(step: Step) -> torch.dtype | None:
    """Return the plain float format that a step casts to; `None` for quantisation and the like."""
    if step.transform in _NAMES:
        return _NAMES[step.transform]
    if "quant" in step.transform:
        return None
    return next((_NAMES[v] for v in step.params.values() if isinstance(v, str) and v in _NAMES), None)


def emulation(step: Step) -> Emulation | None:
    """Return what emulates the rounding of a step, for steps that can say what it costs by that; else `None`."""
    try:
        found: Emulation | None = getattr(catalog.find(step.transform), "emulate", None)
    except CandidateError:
        return None
    return found


def _merge(found: list[dict[str, Error]]) -> dict[str, Error]:
    worst: dict[str, Error] = {}
    for errors in found:
        for path, error in errors.items():
            old = worst.get(path)
            worst[path] = (
                error
                if old is None
                else Error(
                    max(error.row, old.row), min(error.cosine, old.cosine), error.discrete, error.count + old.count
                )
            )
    return worst


def budgets(
    oracle: Oracle, case: str, indices: list[int], low: list[Step], *, max_error: float, noise: float
) -> Budgets:
    """Derive what each output may differ from the oracle.

    Steps that emulate their own rounding (FP8 training): twice what the emulation costs, whatever `max_error` says: no
    implementation of their formats errs less, and what decides about them is gradients and learning. Structural
    candidates: 20 times the reference's own error (at least 1e-5), but never above `max_error` unless the
    reference itself is that far off. A plain cast: twice what plain casting costs, at most `max_error`. Quantisation:
    `max_error`. Integer outputs: the share that twice the plain cast's flips explain, and three elements.
    """
    want = oracle.observed(case)
    exact = [oracle.exact(case, i) for i in indices]
    own = _merge([compare_values(want.outputs[i], e, samples=True) for i, e in zip(indices, exact, strict=True)])
    emulating = [(s, e) for s in low if (e := emulation(s)) is not None]
    rounded: list[dict[str, Error]] = []
    for step, emulate in emulating:
        flats = [oracle.emulated(case, i, step, emulate) for i in indices]
        rounded.append(
            _merge([compare_values(f, e, samples=True) for f, e in zip(flats, exact, strict=True) if f is not None])
        )
    dtypes = {declared_dtype(s) for s in low if emulation(s) is None}
    costs: list[dict[str, Error]] = []
    if dtypes and None not in dtypes:
        for dtype in dtypes:
            assert dtype is not None
            casts = [oracle.cast(case, i, dtype) for i in indices]
            pairs = [(c, e) for c, e in zip(casts, exact, strict=True) if c is not None]
            costs.append(_merge([compare_values(c, e, samples=True) for c, e in pairs]))
    allowed = {}
    for path, mine in own.items():
        if mine.discrete:
            flips = max([mine.row, *(c[path].row for c in (*costs, *rounded) if path in c)]) * mine.count
            allowed[path] = min(0.5, (2 * flips + 3) / max(mine.count, 1)) + 3 * noise
            continue
        floor = max([1e-5, 2 * mine.row, 3 * noise, *(_CAST * c[path].row for c in rounded if path in c)])
        if not low:
            limit = min(max_error, _REORDERED * mine.row)
        elif costs and all(path in c for c in costs):
            rounding = max(2 * torch.finfo(d).eps for d in dtypes if d is not None)
            limit = min(max_error, max(rounding, _CAST * max(c[path].row for c in costs)))
        elif len(emulating) == len(low):
            limit = floor
        else:
            limit = max_error
        allowed[path] = max(floor, limit)
    return Budgets(allowed, {k: v.row for k, v in own.items()})


def precision_checks(
    got: Observed, oracle: Oracle, case: str, indices: list[int], limits: Budgets
) -> tuple[list[Check], float]:
    """Return the checks of a case, the worst of several inputs for each output, and the smallest cosine."""
    exact: list[Flat] = [oracle.exact(case, i) for i in indices]
    found = _merge([compare_values(got.outputs[i], e, samples=True) for i, e in zip(indices, exact, strict=True)])
    checks, cosine = [], 1.0
    for path, error in found.items():
        budget = limits.allowed[path]
        cosine = min(cosine, error.cosine)
        what = "of the elements differ" if error.discrete else "relative error of the worst sample"
        detail = f"{error.row:.2g} {what}, above {budget:.2g}" if not error.row <= budget else ""
        checks.append(Check(path, Gate.PRECISION, error.row, budget, detail, case))
    return checks, cosine
