"""Whether one module is slower than another: both timed in turns in this process, judged as the guard judges."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from kernel_pytorch.core.types import Measurement, Ratio, Verdict
from kernel_pytorch.core.workload import Call
from kernel_pytorch.validation.regression import Sequential

__all__ = ["PerformanceVerdict", "judge_speed"]

_MAX_PAIRS = 400


@dataclass(frozen=True, slots=True)
class PerformanceVerdict:
    """Whether a module is slower than another.

    Attributes:
        verdict: `PASS`, `FAIL` or `INCONCLUSIVE`.
        ratio: Speed-up of the candidate with the interval that was judged.
        measurement: All samples.
        reason: The ground of the verdict, one sentence.
        notes: What else the samples show: noise of one side alone, a trend, a warm-up.
    """

    verdict: Verdict
    ratio: Ratio
    measurement: Measurement
    reason: str = ""
    notes: tuple[str, ...] = ()


def judge_speed(
    candidate: nn.Module,
    reference: nn.Module,
    call: Call,
    *,
    training: bool,
    max_seconds: float,
    max_slowdown: float,
) -> PerformanceVerdict:
    """Call two modules in turns until it is certain whether the candidate is slower.

    Args:
        candidate: What may have become slower.
        reference: What it is compared with; both at one device.
        call: Example inputs.
        training: Whether gradients are recorded.
        max_seconds: Limit of warm-up and sampling together.
        max_slowdown: The smallest slowdown that matters, as a fraction.

    Raises:
        ValueError: A `max_slowdown` not above 0.
    """
    from kernel_pytorch.backends import manager_for
    from kernel_pytorch.measure.sampler import compare

    judge = Sequential(max_slowdown, _MAX_PAIRS)
    device = next((p.device.type for p in reference.parameters()), "cpu")

    def once(model: nn.Module) -> Any:
        with torch.set_grad_enabled(training):
            return model(*call.args, **call.kwargs)

    measured = compare(
        manager_for(device),
        partial(once, reference),
        partial(once, candidate),
        max_seconds=max_seconds,
        min_pairs=judge.looks[0],
        max_pairs=_MAX_PAIRS,
        confidence=judge.early_confidence,
        stop=judge.stop,
    )
    judged = judge.last(measured.baseline_samples_ms, measured.samples_ms)
    ratio = judged.speedup
    return PerformanceVerdict(judged.verdict, ratio, replace(measured, ratio=ratio), judged.reason, judged.notes)
