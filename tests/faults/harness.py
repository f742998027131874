"""Try a fault, or a faithful transform, through the very path a search uses, and say what the validator saw."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from kernel_pytorch.backends import manager_for
from kernel_pytorch.catalog import TRANSFORMS
from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.protocols import Transform
from kernel_pytorch.core.types import Candidate, Check, Measurement, Mode, Ratio, Status, Step, Trial
from kernel_pytorch.search import trial
from kernel_pytorch.search.bench import Bench, prepare_bench
from kernel_pytorch.search.trial import TrialRequest

from .faulty import BY_NAME, FAULTS, Faulty
from .models import MODELS

COMBINATIONS = ("alone", "bf16", "compile", "bf16+compile")


def catalogue(extra: Sequence[Transform] = ()) -> tuple[Transform, ...]:
    """Return the real transforms between faults of layers (applied first) and faults of a runtime (applied last)."""
    inner = [f for f in FAULTS if not f.outermost]
    outer = [f for f in FAULTS if f.outermost]
    return (*inner, *extra, *TRANSFORMS, *outer)


def bench_for(model: str, mode: Mode, seed: int = 0, max_error: float = 2e-2) -> Bench:
    """Return the unmodified model with its inputs; fresh, for a measurement of training steps changes it."""
    config = KernelPyTorchConfig(mode=mode, isolation="none", seed=seed, max_error=max_error)
    workload = MODELS[model].workload(mode, model)
    return prepare_bench(workload, config, manager_for("cpu"), seed=seed, transforms=catalogue())


def companions(combination: str, mode: Mode) -> tuple[Step, ...]:
    """Return the real steps of a combination."""
    steps = []
    if "bf16" in combination:
        steps.append(Step("dtype", {"to": "bfloat16", "how": "cast" if mode is Mode.INFERENCE else "autocast"}))
    if "compile" in combination:
        steps.append(Step("compile", {"mode": "default"}))
    return tuple(steps)


@dataclass(frozen=True)
class Attempt:
    """One cell of the matrix."""

    fault: str
    size: str
    model: str
    mode: Mode
    combination: str = "alone"

    @property
    def key(self) -> str:
        """Identify the cell."""
        return "/".join((self.fault, self.size, self.model, self.mode.value, self.combination))

    @property
    def candidate(self) -> Candidate:
        """Return the fault among its companions."""
        return Candidate((BY_NAME[self.fault].step(self.size), *companions(self.combination, self.mode)))


def attempts(faults: Sequence[str], models: Sequence[str], combinations: Sequence[str] = ("alone",)) -> list[Attempt]:
    """Return the cells in which a fault may apply."""
    return [
        Attempt(name, size, model, mode, combination)
        for combination in combinations
        for model in models
        for mode in Mode
        for name in faults
        if mode in BY_NAME[name].modes and (MODELS[model].sequence or not BY_NAME[name].sequence)
        for size in BY_NAME[name].sizes
    ]


def try_untimed(bench: Bench, request: TrialRequest) -> Trial:
    """Run a trial as a search would, without the timing that would follow where it passes."""
    torch._dynamo.reset()
    untimed = Measurement((1.0,), (1.0,), Ratio(1.0, 1.0, 1.0))
    with mock.patch.object(trial, "_measure", return_value=untimed):
        return trial.run_trial(bench, request)


def try_out(attempt: Attempt, memo_dir: Path | None = None, *, level: str = "standard") -> Trial:
    """Run one cell."""
    bench = bench_for(attempt.model, attempt.mode)
    memo = str(memo_dir) if memo_dir is not None else ""
    return try_untimed(bench, TrialRequest(attempt.candidate, level=level, memo_dir=memo))


def applies(outcome: Trial) -> bool:
    """Return whether the fault found something to strike."""
    return not (outcome.status is Status.FAILED and outcome.reason.startswith("CandidateError"))


def failed_checks(outcome: Trial) -> list[Check]:
    """Return the checks that did not pass, first gate first."""
    return [c for c in outcome.numerics.checks if not c.passed] if outcome.numerics else []


def reason_matches(fault: Faulty, outcome: Trial) -> bool:
    """Return whether a failed check is of a gate and of a kind that this fault must be rejected for."""
    if outcome.status is Status.FAILED:
        return any(re.search(pattern, outcome.reason, re.IGNORECASE) for gate, pattern in fault.expected if pattern)
    return any(
        check.gate is gate and re.search(pattern, check.name)
        for check in failed_checks(outcome)
        for gate, pattern in fault.expected
    )


def row_of(attempt: Attempt, outcome: Trial) -> dict[str, Any]:
    """Return a row of the artefact."""
    fault = BY_NAME[attempt.fault]
    worst = next(iter(sorted(failed_checks(outcome), key=lambda c: list(type(c.gate)).index(c.gate))), None)
    return {
        "key": attempt.key,
        "fault": attempt.fault,
        "size": attempt.size,
        "model": attempt.model,
        "mode": attempt.mode.value,
        "combination": attempt.combination,
        "status": outcome.status.value,
        "detected": outcome.status is not Status.OK,
        "expected_reason": " or ".join(f"{gate.value}: {pattern or 'any'}" for gate, pattern in fault.expected),
        "reason_matched": outcome.status is not Status.OK and reason_matches(fault, outcome),
        "gate": worst.gate.value if worst else "",
        "check": worst.name if worst else "",
        "detail": (worst.detail if worst else outcome.reason)[:200],
        "case": worst.case if worst else "",
        "error": worst.error if worst else None,
        "budget": worst.budget if worst else None,
        "seconds": round(outcome.seconds, 2),
    }
