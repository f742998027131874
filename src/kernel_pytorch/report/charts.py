"""The numbers behind the page's charts, as plain JSON; how they look is the script's business."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kernel_pytorch.core.types import Plan, Status, Trial
from kernel_pytorch.report import figures, reading

__all__ = ["chart_data"]

Chart = dict[str, Any]

_LEAST_ERROR, _MOST_ERROR = 1e-17, 1e3
_SLOWEST = 2.5
"""Candidates slower than the unmodified model by this factor are drawn at the edge, so that the others stay apart."""

_SHOWN_LAYERS, _SHOWN_MEMORY = 30, 12

_MODEL, _WINNER, _OPERATOR = "unmodified", "chosen", "operator"


def chart_data(plan: Plan) -> dict[str, Chart]:
    """Return the data of every chart that this plan has figures for, by chart name."""
    charts = {
        "ladder": _ladder(plan),
        "trials": _trials(plan),
        "roofline": _roofline(plan),
        "layers": _layers(plan),
        "memory": _memory(plan),
        "operators": _operators(plan),
        "ceilings": _ceilings(plan),
        "samples": _samples(plan),
    }
    return {name: data for name, data in charts.items() if data}


def _ladder(plan: Plan) -> Chart:
    rungs = reading.ladder(plan)
    return (
        {
            "rungs": [
                {
                    "label": " + ".join(map(reading.short_step, rung.added)) or "unmodified",
                    "added": len(rung.added),
                    "ms": rung.ms,
                    "time": figures.milliseconds(rung.ms),
                    "speedup": figures.interval(rung.ratio) if rung.ratio else "",
                }
                for rung in rungs
            ]
        }
        if rungs
        else {}
    )


def _point(plan: Plan, trial: Trial, baseline_ms: float) -> Chart:
    ratio, error = reading.speedup(trial), reading.measured_error(trial)
    unmodified = not trial.candidate.steps
    return {
        "label": reading.short(trial.candidate),
        "kind": _MODEL if unmodified else _WINNER if trial.candidate == plan.candidate else str(trial.status),
        "ms": baseline_ms / ratio.value if ratio else None,
        "low_ms": baseline_ms / ratio.high if ratio else None,
        "high_ms": baseline_ms / ratio.low if ratio else None,
        "speedup": figures.interval(ratio) if ratio else "not timed",
        "compared": error is not None or unmodified,
        "error_text": figures.error(error[0]) if error else "not compared",
        "why": reading.why(plan, trial),
    }


def _trials(plan: Plan) -> Chart:
    trials = reading.rank(plan)
    baseline_ms = baseline_time(plan)
    if baseline_ms is None:
        return {}
    budget = _budget(plan)
    known = [e[0] for t in trials if (e := reading.measured_error(t)) is not None and 0 < e[0] < math.inf]
    floor = 10.0 ** (math.floor(math.log10(max(min([*known, budget]), _LEAST_ERROR))) - 1)
    top = 10.0 ** math.ceil(math.log10(min(max([*known, budget]), _MOST_ERROR)) + 0.2)
    drawn, not_drawn = [], []
    for number, trial in enumerate(trials, 1):
        point, error = _point(plan, trial, baseline_ms), reading.measured_error(trial)
        if point["ms"] is None and error is None:
            not_drawn.append(point["label"])
            continue
        drawn.append({"number": number, **point, "error": _height(trial, error[0] if error else None, floor, top)})
    return {
        "points": drawn,
        "not_drawn": not_drawn,
        "budget": budget,
        "budget_text": figures.error(budget),
        "floor": floor,
        "top": top,
        "baseline_ms": baseline_ms,
        "slowest_ms": baseline_ms * _SLOWEST,
        "slower": any(p["ms"] is not None and p["ms"] > baseline_ms * _SLOWEST for p in drawn),
    }


def _height(trial: Trial, error: float | None, floor: float, top: float) -> float:
    """Return where a trial stands on the error axis; one that is wrong by no number stands at the top."""
    if error is None or math.isnan(error):
        return top if trial.status is Status.WRONG else floor
    return min(max(error, floor), top)


def baseline_time(plan: Plan) -> float | None:
    """Return the unmodified model's time: of the confirmation, else of any trial, else what was predicted from."""
    for trial in (plan.chosen, *reversed(plan.evidence)):
        if trial.measurement is not None:
            return trial.measurement.baseline_median_ms
    return plan.prediction.baseline_ms or None


def _budget(plan: Plan) -> float:
    """Return what the user allowed; plans that do not say, the largest budget a trial was held to."""
    configured = plan.config.get("max_error")
    if isinstance(configured, int | float) and configured > 0:
        return float(configured)
    judged = (e[1] for t in plan.evidence if (e := reading.measured_error(t)) is not None)
    return max((budget for budget in judged if 0 < budget < math.inf), default=1e-2)


def _roofline(plan: Plan) -> Chart:
    prediction, device = plan.prediction, plan.device
    now_ms = baseline_time(plan)
    if not (prediction.flops > 0 and prediction.bytes > 0 and device.peak_flops and now_ms):
        return {}
    intensity = prediction.flops / prediction.bytes
    points = [_dot("unmodified", _MODEL, intensity, prediction.flops, now_ms)]
    ratio = reading.speedup(plan.chosen)
    if plan.candidate.steps and ratio is not None:
        points.append(_dot("chosen", _WINNER, intensity, prediction.flops, now_ms / ratio.value))
    points += [
        _dot(s.kind, _OPERATOR, s.flops / s.bytes, s.flops, s.time_share * prediction.baseline_ms)
        for s in prediction.shares
        if s.flops > 0 and s.bytes > 0 and s.time_share * prediction.baseline_ms > 0
    ]
    ridges = [peak / device.bandwidth_bytes_per_s for peak in device.peak_flops.values()]
    left = 10.0 ** math.floor(math.log10(min(*ridges, *(p["x"] for p in points)) / 5))
    right = 10.0 ** math.ceil(math.log10(max(*ridges, *(p["x"] for p in points)) * 2))
    heights = [p["y"] for p in points]
    return {
        "points": points,
        "bandwidth": device.bandwidth_bytes_per_s,
        "bandwidth_text": figures.rate(device.bandwidth_bytes_per_s, "B"),
        "roofs": [
            {
                "dtype": names,
                "peak": peak,
                "text": figures.rate(peak, "FLOP"),
                "ridge": peak / device.bandwidth_bytes_per_s,
            }
            for peak, names in _roofs(device.peak_flops)
        ],
        "x": [left, right],
        "y": [
            10.0 ** math.floor(math.log10(min(heights) / 2)),
            10.0 ** math.ceil(math.log10(max(*device.peak_flops.values(), *heights) * 1.2)),
        ],
    }


def _roofs(peaks: Mapping[str, float]) -> list[tuple[float, str]]:
    """Return the roofs from the lowest up; formats whose peaks differ by less than 5 % share one."""
    roofs: list[tuple[float, str]] = []
    for dtype, peak in sorted(peaks.items(), key=lambda item: item[1]):
        if roofs and peak <= roofs[-1][0] * 1.05:
            roofs[-1] = roofs[-1][0], f"{roofs[-1][1]}, {dtype}"
        else:
            roofs.append((peak, dtype))
    return roofs


def _dot(label: str, kind: str, intensity: float, flops: float, ms: float) -> Chart:
    achieved = flops / (ms * 1e-3)
    return {
        "label": label,
        "kind": kind,
        "x": intensity,
        "y": achieved,
        "text": f"{figures.rate(achieved, 'FLOP')} at {figures.number(intensity)} FLOP per byte",
    }


def _layers(plan: Plan) -> Chart:
    layers = reading.layers(plan)
    if not layers:
        return {}
    rows = sorted(layers.items(), key=lambda item: -item[1][0])[:_SHOWN_LAYERS]
    return {
        "names": [name or "(the model itself)" for name, _ in rows],
        "before": [before for _, (before, _) in rows],
        "after": [after for _, (_, after) in rows],
    }


def _memory(plan: Plan) -> Chart:
    measurement = plan.chosen.measurement
    before = measurement.baseline_peak_bytes if measurement else None
    rows = [] if before is None else [(_MODEL, _MODEL, before)]
    for trial in reading.rank(plan):
        peak = trial.measurement.peak_bytes if trial.measurement else None
        if peak is None or not trial.candidate.steps:
            continue
        kind = _WINNER if trial.candidate == plan.candidate else str(trial.status)
        rows.append((reading.short(trial.candidate), kind, peak))
    if len(rows) < 2:
        return {}
    return {
        "rows": [{"label": n, "kind": k, "bytes": b, "text": figures.size(b)} for n, k, b in rows],
        "shown": _SHOWN_MEMORY,
    }


def _operators(plan: Plan) -> Chart:
    shares = plan.prediction.shares
    return {"names": [s.kind for s in shares], "shares": [s.time_share for s in shares]} if shares else {}


def _ceilings(plan: Plan) -> Chart:
    rows = [c for c in reading.ceilings(plan) if math.isfinite(c.bound)]
    return (
        {
            "rows": [
                {
                    "label": c.label,
                    "bound": c.bound,
                    "measured": c.measured.value if c.measured else None,
                    "text": figures.interval(c.measured) if c.measured else "not measured alone",
                    "kept": c.kept,
                }
                for c in rows
            ]
        }
        if rows
        else {}
    )


def _samples(plan: Plan) -> Chart:
    measurement = plan.chosen.measurement
    if measurement is None:
        return {}
    return {
        "baseline": list(measurement.baseline_samples_ms),
        "chosen": list(measurement.samples_ms),
        "baseline_median": measurement.baseline_median_ms,
        "chosen_median": measurement.median_ms,
        "chosen_name": "chosen" if plan.candidate.steps and plan.chosen.status is Status.OK else "unmodified, again",
    }
