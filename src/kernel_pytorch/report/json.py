"""A plan as the JSON object of `kpt explain --format json`."""

from __future__ import annotations

import math
from typing import Any

from kernel_pytorch.core.step_memory import StepMemory
from kernel_pytorch.core.types import Check, Plan, Step, Trial
from kernel_pytorch.report import reading

__all__ = ["explain"]


def explain(plan: Plan) -> dict[str, Any]:
    """Return what won, by how much, at which error, and why each other candidate lost.

    Every value is plain JSON; a figure that was not measured or is not finite is `None`.
    """
    ratio = reading.speedup(plan.chosen)
    measurement, report = plan.chosen.measurement, plan.chosen.numerics
    return {
        "speedup": _finite(ratio.value if ratio else None),
        "speedup_low": _finite(ratio.low if ratio else None),
        "speedup_high": _finite(ratio.high if ratio else None),
        "headline": f"{reading.headline(plan)}: {reading.sentence(plan)}",
        "chosen": [_step(s) for s in plan.candidate.steps],
        "numerics": {
            "passed": None if report is None else report.passed,
            "max_rel_error": None if report is None else _finite(report.max_rel_error),
            "budget": None if report is None else _finite(report.budget),
            "worst": None if report is None or report.worst is None else _check(report.worst),
            "cosine": None if report is None else _finite(report.cosine),
            "unchecked": [] if report is None else list(report.unchecked),
        },
        "baseline_ms": None if measurement is None else _finite(measurement.baseline_median_ms),
        "chosen_ms": None if measurement is None else _finite(measurement.median_ms),
        "break_even_calls": None if measurement is None else measurement.break_even_calls,
        "device": {
            "key": plan.device.key,
            "vendor": plan.device.vendor,
            "name": plan.device.name,
            "arch": plan.device.arch,
            "verified": plan.device.verified,
        },
        "software": dict(plan.device.software),
        "workload": {
            "name": plan.workload.name,
            "fingerprint": plan.workload.fingerprint,
            "mode": str(plan.workload.mode),
            "parameters": plan.workload.parameters,
        },
        "memory": [_memory(m) for m in plan.memory],
        "trials": [_trial(plan, t) for t in plan.evidence],
        "untried": [{"candidate": u.candidate.label, "reason": u.reason} for u in plan.untried],
        "skipped": [{"transform": s.transform, "reason": s.reason, "fix": s.fix} for s in plan.skipped],
        "created": plan.created,
        "command": plan.command,
        "search_seconds": _finite(plan.search_seconds),
    }


def _step(step: Step) -> dict[str, Any]:
    return {"transform": step.transform, "params": dict(step.params)}


def _check(check: Check) -> dict[str, Any]:
    return {
        "name": check.name,
        "gate": str(check.gate),
        "error": _finite(check.error),
        "budget": _finite(check.budget),
        "detail": check.detail,
        "case": check.case,
    }


def _memory(memory: StepMemory) -> dict[str, Any]:
    return {
        "whose": str(memory.whose),
        "place": memory.place,
        "how": "compiled",
        "verified": False,
        "fits": memory.fits,
        "peak_bytes": memory.peak_bytes or None,
        "needed_bytes": memory.needed_bytes or None,
        "capacity_bytes": memory.capacity_bytes or None,
        "parts": dict(memory.parts),
        "modules": {m.module: m.bytes for m in memory.modules},
        "reason": memory.reason,
    }


def _trial(plan: Plan, trial: Trial) -> dict[str, Any]:
    measurement = trial.measurement
    error = reading.measured_error(trial)
    return {
        "candidate": trial.candidate.label,
        "steps": [_step(s) for s in trial.candidate.steps],
        "status": str(trial.status),
        "phase": trial.phase,
        "reason": reading.why(plan, trial),
        "speedup": None if measurement is None else _finite(measurement.ratio.value),
        "speedup_low": None if measurement is None else _finite(measurement.ratio.low),
        "speedup_high": None if measurement is None else _finite(measurement.ratio.high),
        "median_ms": None if measurement is None else _finite(measurement.median_ms),
        "peak_bytes": None if measurement is None else measurement.peak_bytes,
        "compile_seconds": None if measurement is None else _finite(measurement.compile_seconds),
        "max_rel_error": None if error is None else _finite(error[0]),
        "isolation": trial.isolation,
        "notes": list(trial.notes),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
