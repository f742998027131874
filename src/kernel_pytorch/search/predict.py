"""What can be said before anything is tried: where the time goes, the roofline floor, and a ceiling by candidate."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from kernel_pytorch.core.describe import private_copy
from kernel_pytorch.core.program import clone_model
from kernel_pytorch.core.protocols import HardwareManager, Transform
from kernel_pytorch.core.types import (
    Candidate,
    DeviceSpec,
    Mode,
    Numerics,
    OperatorShare,
    Prediction,
    WorkloadSpec,
)
from kernel_pytorch.core.workload import Call, Workload
from kernel_pytorch.hardware import cache_bytes
from kernel_pytorch.search.figures import CaseFigures, Unmodified
from kernel_pytorch.search.roofline import FASTEST, Roofline

__all__ = ["predict"]

_MARGIN = 1.25
"""What a measured peak may be exceeded by: seen once at 1.1 (another shape of the same product), and some room."""

_WIDTH = {"bfloat16": 0.5, "float16": 0.5, "tf32": 1.0}
"""Bytes per byte of a float32 model, by what a step's parameters name."""

_NARROWEST = 0.125
"""Of four-bit weights: the least that any lower precision reads."""

_FOREIGN_PERCENT = 15.0

_PRODUCTS = ("matmul", "convolution", "attention")


def predict(  # noqa: PLR0917  one argument for each stage that came before
    workload: Workload,
    model: nn.Module,
    calls: Mapping[str, Call],
    spec: WorkloadSpec,
    device: DeviceSpec,
    manager: HardwareManager,
    transforms: Sequence[Transform],
    proposals: Sequence[Candidate],
) -> Prediction:
    """Measure the unmodified model a few times and bound what each proposal could gain.

    Args:
        workload: The workload.
        model: The unmodified model; left as it is.
        calls: Example calls by case.
        spec: Its description.
        device: The device.
        manager: Runs and times on it.
        transforms: Asked for the ceiling of their steps.
        proposals: Candidates to bound; each of their single steps is bounded too.

    Returns:
        Time, floor, operations and bytes are means over the cases by their weight.
    """
    model = manager.place(model)
    model = clone_model(model) if spec.mode is Mode.TRAINING else private_copy(model, spec.mode)
    unmodified = Unmodified(workload, model, calls, spec.mode, manager)
    manager.telemetry()  # what others take is counted from here
    cases = [unmodified.figures(case, weight) for case, weight in workload.weights.items()]
    others = manager.telemetry().get("cpu_others_percent", 0.0)
    baseline_ms = sum(c.weight * c.ms for c in cases)
    roofline = Roofline(
        device=device,
        flops=_flops_by_dtype(cases),
        least_bytes=sum(c.weight * c.least_bytes for c in cases),
        resident_bytes=cache_bytes(device),
    )
    prediction = Prediction(
        baseline_ms=baseline_ms,
        floor_ms=min(baseline_ms, 1e3 * roofline.floor_s()),
        flops=sum(roofline.flops.values()),
        bytes=roofline.least_bytes,
        shares=_shares(cases, baseline_ms),
        ceilings={},
    )
    by_name = {transform.name: transform for transform in transforms}
    singles = [Candidate((step,)) for candidate in proposals for step in candidate.steps]
    ceilings = {c.label: _ceiling(c, by_name, prediction, roofline) for c in (*singles, *proposals) if c.steps}
    notes = [_limit(prediction, roofline), *_caveats(prediction, device, cases), *_useless(ceilings)]
    if others > _FOREIGN_PERCENT:
        notes.append(f"other processes took {others:.0f} % of the CPU meanwhile: these times and ceilings are too high")
    return replace(prediction, ceilings=ceilings, notes=tuple(notes))


def _flops_by_dtype(cases: Sequence[CaseFigures]) -> dict[str, float]:
    total: dict[str, float] = {}
    for case in cases:
        for work in case.counter.work.values():
            for dtype, flops in work.flops.items():
                total[dtype] = total.get(dtype, 0.0) + case.weight * flops
    return total


def _shares(cases: Sequence[CaseFigures], baseline_ms: float) -> tuple[OperatorShare, ...]:
    shares = []
    for kind in {kind for case in cases for kind in (*case.shares, *case.counter.work)}:
        done = [(case.weight, case.counter.work[kind]) for case in cases if kind in case.counter.work]
        shares.append(
            OperatorShare(
                kind=kind,
                time_share=sum(c.weight * c.ms * c.shares.get(kind, 0.0) for c in cases) / baseline_ms,
                calls=sum(work.calls for _, work in done),
                flops=sum(weight * sum(work.flops.values()) for weight, work in done),
                bytes=sum(weight * work.bytes for weight, work in done),
            )
        )
    return tuple(sorted(shares, key=lambda share: (-share.time_share, share.kind)))


def _ceiling(
    candidate: Candidate, transforms: Mapping[str, Transform], prediction: Prediction, roofline: Roofline
) -> float:
    """Return what is left of the time when all steps save what each can alone, bounded by the roofline floor.

    Not the product of the steps' ceilings: once one step has shrunk the matrix products, what another one saves is
    a larger share of the rest. The floor is that at the candidate's precision.
    """
    saved, precisions, width = 0.0, set(), 1.0
    for step in candidate.steps:
        transform = transforms[step.transform]
        saved += 1.0 - 1.0 / max(1.0, transform.ceiling(step, prediction, roofline.device))
        if transform.numerics is Numerics.LOWER_PRECISION:
            named = [str(value) for value in step.params.values() if str(value) in _WIDTH]
            precisions.add(named[0] if named else FASTEST)
            width = min(width, _WIDTH[named[0]] if named else _NARROWEST)
    precision = "" if not precisions else precisions.pop() if len(precisions) == 1 else FASTEST
    floor_ms = 1e3 * roofline.floor_s(precision, width)
    bound = 1.0 / (1.0 - saved) if saved < 1.0 else math.inf
    if floor_ms <= 0:
        return bound
    return max(1.0, min(bound, _MARGIN * prediction.baseline_ms / floor_ms))


def _limit(prediction: Prediction, roofline: Roofline) -> str:
    """Say in words what limits the unmodified model."""
    share = {s.kind: s.time_share for s in prediction.shares}
    products, overhead = sum(share.get(kind, 0.0) for kind in _PRODUCTS), share.get("overhead", 0.0)
    baseline_s = prediction.baseline_ms / 1e3
    if overhead > 0.5:
        return (
            f"overhead-bound: {overhead:.0%} of the time is outside any operator's own work "
            "(Python, dispatch, launches); compiling or larger batches can help, arithmetic cannot"
        )
    if roofline.memory_s() > 0.5 * baseline_s and roofline.memory_s() > roofline.compute_s():
        return f"memory-bound: moving the weights, inputs and outputs once takes {roofline.memory_s() / baseline_s:.0%}"
    if products > 0.5:
        at = min(1.0, roofline.compute_s() / baseline_s)
        return (
            f"compute-bound: {products:.0%} of the time is in matrix products; the whole call reaches {at:.0%} of peak"
        )
    rest = {kind: value for kind, value in share.items() if kind not in (*_PRODUCTS, "overhead")}
    largest = max(rest, key=lambda kind: rest[kind], default="other")
    return (
        f"memory-bound: {sum(rest.values()):.0%} of the time is in operators that move data, most of it in "
        f"{largest}; fusing them can help"
    )


def _caveats(prediction: Prediction, device: DeviceSpec, cases: Sequence[CaseFigures]) -> list[str]:
    share = {s.kind: s.time_share for s in prediction.shares}
    notes = []
    matmul = share.get("matmul", 0.0)
    if matmul < 0.1:
        notes.append(f"quantising weights cannot help much: {matmul:.0%} of the time is in matmuls")
    uncounted: collections.Counter[str] = sum((c.counter.uncounted for c in cases), collections.Counter())
    if uncounted:
        notes.append(f"the operations of {', '.join(sorted(uncounted))} are not counted: the true floor is higher")
    if device.vendor == "tpu":
        notes.append("shares of the time are estimated from operations and bytes: a TPU runs operators unobserved")
    if not device.peak_flops:
        notes.append(f"the peak rates of {device.arch} are not known: there is no compute floor")
    return notes


def _useless(ceilings: Mapping[str, float]) -> list[str]:
    labels = [label for label, ceiling in ceilings.items() if ceiling < 1.02]
    return [f"cannot gain 2 %: {', '.join(labels)}"] if labels else []
