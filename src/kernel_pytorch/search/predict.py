"""What can be said before anything is tried: where the time goes, the roofline floor, and a ceiling by candidate."""

from __future__ import annotations

import collections
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from kernel_pytorch.core.describe import make_optimizer, training_loss
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
from kernel_pytorch.search.operators import WorkCounter, least_bytes
from kernel_pytorch.search.profile import time_shares

__all__ = ["predict"]

_TIMING_S = 0.8
_MARGIN = 1.25
"""What a measured peak may be exceeded by: measured once 1.1 (the same product at another shape), and some room."""

_WIDTH = {"bfloat16": 0.5, "float16": 0.5, "tf32": 1.0}
_NARROWEST = 0.125
"""Bytes of a weight in four bits, of one in float32: the least that any lower precision reads."""


@dataclass(frozen=True, slots=True)
class _CaseFigures:
    """Of one case: time, shares by class, and the work counted."""

    weight: float
    ms: float
    shares: Mapping[str, float]
    counter: WorkCounter
    least_bytes: float


def predict(
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
        model: The unmodified model; a copy runs in training, the model itself in inference.
        calls: Example calls by case.
        spec: Its description.
        device: The device.
        manager: Runs and times on it.
        transforms: Asked for the ceiling of their steps.
        proposals: Candidates to bound; each of their single steps is bounded too.
    """
    model = manager.place(model)
    if spec.mode is Mode.TRAINING:
        model = clone_model(model)
    cases = [
        _figures(workload, model, calls, case, weight, spec.mode, manager) for case, weight in workload.weights.items()
    ]
    baseline_ms = sum(c.weight * c.ms for c in cases)
    flops = _flops_by_dtype(cases)
    least = sum(c.weight * c.least_bytes for c in cases)
    resident = cache_bytes(device)
    compute_s = _compute_seconds(flops, device, None)
    memory_s = _memory_seconds(least, resident, device)
    prediction = Prediction(
        baseline_ms=baseline_ms,
        floor_ms=min(baseline_ms, 1e3 * max(compute_s, memory_s)),
        flops=sum(flops.values()),
        bytes=least,
        shares=_shares(cases, baseline_ms),
        ceilings={},
    )
    by_name = {transform.name: transform for transform in transforms}
    ceilings: dict[str, float] = {}
    singles = {Candidate((step,)) for candidate in proposals for step in candidate.steps}
    for candidate in sorted({*singles, *proposals}, key=lambda c: (len(c.steps), c.label)):
        if candidate.steps:
            ceilings[candidate.label] = _ceiling(candidate, by_name, prediction, device, flops, least, resident)
    notes = _notes(prediction, device, compute_s, memory_s, cases, ceilings)
    return replace(prediction, ceilings=ceilings, notes=notes)


def _figures(
    workload: Workload,
    model: nn.Module,
    calls: Mapping[str, Call],
    case: str,
    weight: float,
    mode: Mode,
    manager: HardwareManager,
) -> _CaseFigures:
    step, state = _step(workload, model, calls, case, mode, manager)
    counter = WorkCounter()
    result = step()
    with counter:
        result = step()
    parameters = [*model.parameters(), *model.buffers()]
    least = least_bytes(parameters, counter) + _tree_bytes(result) + _tree_bytes((calls[case].args, dict(calls[case].kwargs)))
    # A training step also writes what the optimizer changes, and reads and writes the optimizer's state.
    trainable = sum(_tree_bytes(p) for p in model.parameters() if p.requires_grad)
    if mode is Mode.TRAINING:
        least += trainable + 2 * _tree_bytes(state())
    return _CaseFigures(
        weight=weight,
        ms=_median_ms(manager, step),
        shares=time_shares(step, manager.synchronize, manager.vendor),
        counter=counter,
        least_bytes=least,
    )


def _step(
    workload: Workload, model: nn.Module, calls: Mapping[str, Call], case: str, mode: Mode, manager: HardwareManager
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return a function that runs one call or one training step, and one that returns the optimizer's state."""
    if mode is Mode.INFERENCE:
        call = manager.place(calls[case])

        def infer() -> Any:
            with torch.no_grad():
                return model(*call.args, **call.kwargs)

        return infer, tuple
    batch = manager.place(workload.batch(case, 0))
    loss, optimizer = training_loss(workload), make_optimizer(workload, model.parameters())

    def train() -> Any:
        optimizer.zero_grad(set_to_none=True)
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        return value.detach()

    return train, lambda: [dict(state) for state in optimizer.state.values()]


def _median_ms(manager: HardwareManager, step: Callable[[], Any]) -> float:
    """Return the median of three to fifteen runs that fit in the budget."""
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or (len(times) < 15 and time.perf_counter() - start < _TIMING_S):
        times.append(manager.time_ms(step))
    return statistics.median(times)


def _tree_bytes(tree: Any) -> float:
    return float(
        sum(t.numel() * t.element_size() for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor))
    )


def _flops_by_dtype(cases: Sequence[_CaseFigures]) -> collections.Counter[str]:
    total: collections.Counter[str] = collections.Counter()
    for case in cases:
        for work in case.counter.work.values():
            for dtype, flops in work.flops.items():
                total[dtype] += case.weight * flops  # type: ignore[assignment]  # a Counter of floats
    return total


def _shares(cases: Sequence[_CaseFigures], baseline_ms: float) -> tuple[OperatorShare, ...]:
    kinds = {kind for case in cases for kind in (*case.shares, *case.counter.work)}
    shares = [
        OperatorShare(
            kind=kind,
            time_share=sum(c.weight * c.ms * c.shares.get(kind, 0.0) for c in cases) / baseline_ms,
            calls=sum(c.counter.work[kind].calls for c in cases if kind in c.counter.work),
            flops=sum(c.weight * sum(c.counter.work[kind].flops.values()) for c in cases if kind in c.counter.work),
            bytes=sum(c.weight * c.counter.work[kind].bytes for c in cases if kind in c.counter.work),
        )
        for kind in kinds
    ]
    return tuple(sorted(shares, key=lambda share: (-share.time_share, share.kind)))


def _compute_seconds(flops: Mapping[str, float], device: DeviceSpec, precision: str | None) -> float:
    """Return the least time of the arithmetic; `precision` replaces each dtype by a faster one, `""` by the fastest."""
    fastest = max(device.peak_flops.values(), default=math.inf)
    seconds = 0.0
    for dtype, count in flops.items():
        own = device.peak_flops.get(_arithmetic(dtype), fastest)
        rate = own if precision is None else max(own, device.peak_flops.get(precision, fastest))
        seconds += count / rate
    return seconds


def _arithmetic(dtype: str) -> str:
    """Return the arithmetic that products of a dtype use: TF32 where the user has allowed it."""
    return "tf32" if dtype == "float32" and torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32 else dtype


def _memory_seconds(least: float, resident: int, device: DeviceSpec) -> float:
    if not device.bandwidth_bytes_per_s:
        return 0.0
    return max(0.0, least - resident) / device.bandwidth_bytes_per_s


def _ceiling(
    candidate: Candidate,
    transforms: Mapping[str, Transform],
    prediction: Prediction,
    device: DeviceSpec,
    flops: Mapping[str, float],
    least: float,
    resident: int,
) -> float:
    """Return the product of the steps' own ceilings, bounded by the roofline floor at the candidate's precision."""
    product = 1.0
    precision: str | None = None
    width = 1.0
    for step in candidate.steps:
        transform = transforms[step.transform]
        product *= max(1.0, transform.ceiling(step, prediction, device))
        if transform.numerics is Numerics.LOWER_PRECISION:
            named = [str(value) for value in step.params.values() if str(value) in _WIDTH]
            precision = named[0] if named and precision is None else ""
            width = min(width, _WIDTH[named[0]] if named else _NARROWEST)
    floor_s = max(_compute_seconds(flops, device, precision), _memory_seconds(least * width, resident, device))
    if floor_s <= 0:
        return product
    return max(1.0, min(product, _MARGIN * prediction.baseline_ms / (1e3 * floor_s)))


def _notes(
    prediction: Prediction,
    device: DeviceSpec,
    compute_s: float,
    memory_s: float,
    cases: Sequence[_CaseFigures],
    ceilings: Mapping[str, float],
) -> tuple[str, ...]:
    share = {s.kind: s.time_share for s in prediction.shares}
    baseline_s = prediction.baseline_ms / 1e3
    notes = []
    products = sum(share.get(kind, 0.0) for kind in ("matmul", "convolution", "attention"))
    if share.get("overhead", 0.0) > 0.5:
        notes.append(f"overhead-bound: {share['overhead']:.0%} of the time is outside any operator's own work")
    elif products > 0.5 and compute_s > memory_s:
        notes.append(
            f"compute-bound: {products:.0%} of the time is in matrix products, at "
            f"{compute_s / baseline_s:.0%} of this machine's peak over the whole call"
        )
    elif products <= 0.5:
        notes.append(f"memory-bound: {1 - products - share.get('overhead', 0.0):.0%} of the time moves data")
    else:
        notes.append(f"memory-bound: reading the weights once takes {memory_s / baseline_s:.0%} of the time")
    if share.get("matmul", 0.0) < 0.1:
        notes.append(f"int8 cannot help much: {share.get('matmul', 0.0):.0%} of the time is in matmuls")
    uncounted: collections.Counter[str] = sum((c.counter.uncounted for c in cases), collections.Counter())
    if uncounted:
        named = ", ".join(sorted(uncounted))
        notes.append(f"no formula for the operations of {named}: the floor is lower than the truth")
    if not device.peak_flops:
        notes.append(f"peak rates of {device.arch} are not known: no compute floor")
    useless = [label for label, ceiling in ceilings.items() if ceiling < 1.02]
    if useless:
        notes.append(f"cannot gain 2 %: {', '.join(useless)}")
    return tuple(notes)
