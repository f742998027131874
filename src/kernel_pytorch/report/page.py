"""The page's text: template, figures and charting library joined into one string."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from kernel_pytorch.core.types import Check, Gate, Mode, NumericsReport, Plan, Status, Trial
from kernel_pytorch.report import figures, reading
from kernel_pytorch.report.charts import chart_data
from kernel_pytorch.report.fit_page import fit_styles
from kernel_pytorch.report.memory import memory_groups

__all__ = ["page"]

_SHOWN_CHECKS = 25

_GATES = {
    Gate.CONTRACT: "Shapes, number formats and types of the outputs, no NaN, and no side effects that were not there.",
    Gate.STRUCTURE: (
        "The steps that should not change the mathematics, run in very high precision with disturbed weights, where "
        "even a small mistake stands out."
    ),
    Gate.KERNEL: "Low-precision kernels against exact arithmetic on the very numbers they were given.",
    Gate.PRECISION: "The model that ships against the unmodified one in higher precision: the rounding you accept.",
    Gate.TRAINING: "Gradients, and a short training run from the same start: a screen, not a proof of convergence.",
}


def page(plan: Plan, *, directory: str) -> str:
    """Return the report of a plan as one HTML document that loads nothing else.

    Args:
        plan: The plan.
        directory: Where the plan lies, for the commands the page shows.
    """
    environment = Environment(
        loader=PackageLoader("kernel_pytorch.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(_context(plan, directory), **_assets())


@cache
def _assets() -> Mapping[str, Any]:
    """Return the parts of the page that no plan changes, and the hashes its content policy allows to run."""
    here = files("kernel_pytorch.report")
    theme = (here / "templates" / "theme.js").read_text("utf-8")
    script = (here / "templates" / "report.js").read_text("utf-8")
    library = (here / "vendor" / "echarts.common.min.js").read_text("utf-8")
    assert not any("</script" in text.lower() for text in (theme, script, library))
    digests = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in (theme, library, script))
    return {
        "theme_script": Markup(theme),  # noqa: S704  # the package's own files, not a plan's text
        "library": Markup(library),  # noqa: S704
        "script": Markup(script),  # noqa: S704
        "style": Markup((here / "templates" / "report.css").read_text("utf-8")) + fit_styles(),  # noqa: S704
        "script_hashes": Markup(" ".join(f"'sha256-{d}'" for d in digests)),  # noqa: S704
        "echarts_version": json.loads((here / "vendor" / "echarts.version.json").read_text("utf-8"))["version"],
    }


def _context(plan: Plan, directory: str) -> dict[str, Any]:
    trials = reading.rank(plan)
    charts = chart_data(plan)
    rows = [_row(plan, trial, number) for number, trial in enumerate(trials, 1)]
    unit = "training step" if plan.workload.mode is Mode.TRAINING else "call"
    if "trials" in charts:
        charts["trials"]["unit"] = unit
    ceilings = reading.ceilings(plan)
    measurement = plan.chosen.measurement
    ladder = charts.get("ladder", {}).get("rungs", [])
    return {
        "plan": plan,
        "name": plan.workload.name or "unnamed model",
        "won": bool(plan.candidate.steps),
        "headline": reading.headline(plan),
        "sentence": _unbroken(_capital(reading.sentence(plan))),
        "steps": [{"short": reading.short_step(s), "full": str(s)} for s in plan.candidate.steps],
        "unit": unit,
        "cards": _cards(plan, unit),
        "charts": charts,
        "ladder": ladder,
        "jumps": any(rung["added"] > 1 for rung in ladder),
        "rows": rows,
        "kinds": {p["kind"] for p in charts.get("trials", {}).get("points", [])},
        "unknown_error": any(not p["compared"] for p in charts.get("trials", {}).get("points", [])),
        "evidence": [_run(t) for t in plan.evidence],
        "numerics": _numerics(plan.chosen.numerics),
        "gates": [(str(gate), text) for gate, text in _GATES.items()],
        "ceilings": [
            {
                "label": c.label,
                "bound": figures.times(c.bound),
                "text": figures.interval(c.measured) if c.measured else "not measured alone",
            }
            for c in ceilings
        ],
        "honesty": _honesty(ceilings),
        "memory": memory_groups(plan),
        "layers": [
            (name or "(the model itself)", figures.milliseconds(before), figures.milliseconds(after))
            for name, (before, after) in reading.layers(plan).items()
        ],
        "samples": list(zip(measurement.baseline_samples_ms, measurement.samples_ms, strict=False))
        if measurement
        else [],
        "untried": reading.untried_by_reason(plan),
        "commands": reading.next_commands(plan, directory),
        "environment": _environment(plan),
        "figures": figures,
    }


def _row(plan: Plan, trial: Trial, number: int) -> dict[str, Any]:
    measurement, error = trial.measurement, reading.measured_error(trial)
    chosen = trial.candidate == plan.candidate
    peak = measurement.peak_bytes if measurement else None
    compiled = measurement.compile_seconds if measurement else 0.0
    return {
        "number": number,
        "chosen": chosen,
        "short": reading.short(trial.candidate),
        "full": trial.candidate.label,
        "tag": str(trial.status) if not chosen else "chosen" if trial.candidate.steps else "kept",
        "speedup": figures.interval(measurement.ratio) if measurement else "not timed",
        "error": figures.error(error[0]) if error else "",
        "peak": "" if peak is None else figures.size(peak),
        "compile": figures.seconds(compiled) if compiled else "",
        "why": reading.why(plan, trial),
        "notes": trial.notes,
    }


def _run(trial: Trial) -> dict[str, Any]:
    measurement = trial.measurement
    return {
        "phase": trial.phase,
        "short": reading.short(trial.candidate),
        "full": trial.candidate.label,
        "status": str(trial.status),
        "speedup": figures.interval(measurement.ratio) if measurement else "",
        "pairs": len(measurement.samples_ms) if measurement else "",
        "isolation": "a process of its own" if trial.isolation == "process" else "the search's process",
        "seconds": figures.seconds(trial.seconds) if trial.seconds else "",
    }


def _cards(plan: Plan, unit: str) -> list[dict[str, Any]]:
    measurement, cards = plan.chosen.measurement, []
    won = bool(plan.candidate.steps)

    def card(title: str, now: str, note: str, *, share: float | None = None) -> None:
        width = None if share is None else f"{min(100.0, max(1.0, share * 100)):.1f}"
        cards.append({"title": title, "now": now, "note": note.replace(" %", "\N{NO-BREAK SPACE}%"), "share": width})

    if measurement is not None:
        before, after = measurement.baseline_median_ms, measurement.median_ms
        if won:
            note = f"from {figures.milliseconds(before)}; medians of {len(measurement.samples_ms)} fresh samples"
            card(f"Time per {unit}", figures.milliseconds(after), note, share=after / before)
        else:
            card(f"Time per {unit}", figures.milliseconds(before), "unmodified, median")
        peak, peak_before = measurement.peak_bytes, measurement.baseline_peak_bytes
        if won and peak is not None and peak_before:
            note = f"from {figures.size(peak_before)}: {_change(peak / peak_before)}"
            card("Peak memory", figures.size(peak), note, share=peak / peak_before)
    error = reading.measured_error(plan.chosen)
    if won and error is not None and error[1] > 0:
        note = f"of {figures.error(error[1])} allowed: {figures.percent(error[0] / error[1])} of the budget"
        card("Error", figures.error(error[0]), note, share=error[0] / error[1])
    if won and measurement is not None:
        calls = measurement.break_even_calls
        note = (
            "nothing to pay back"
            if not measurement.compile_seconds
            else ("never paid back" if calls is None else f"paid back after {calls:,} {unit}s")
        )
        card(
            "Compile time",
            figures.seconds(measurement.compile_seconds) if measurement.compile_seconds else "none",
            note,
        )
    tried = [t for t in reading.rank(plan) if t.candidate.steps]
    took = f"in {figures.seconds(plan.search_seconds)}" if plan.search_seconds else "in this search"
    rejected = sum(t.status is not Status.OK for t in tried)
    card("Candidates tried", str(len(tried)), f"{took}; {rejected} were wrong or did not finish")
    return cards


def _change(ratio: float) -> str:
    if abs(ratio - 1) < 0.005:
        return "unchanged"
    return f"{abs(1 - ratio) * 100:.0f} % {'less' if ratio < 1 else 'more'}"


def _numerics(report: NumericsReport | None) -> dict[str, Any] | None:
    if report is None or not report.checks:
        return None

    def used(check: Check) -> float:
        if not check.passed:
            return math.inf
        return check.error / check.budget if check.budget else 0.0

    checks = sorted(report.checks, key=used, reverse=True)
    shown = checks[:_SHOWN_CHECKS]
    failed = sum(not c.passed for c in checks)
    summary = f"All {len(checks)} checks passed." if not failed else f"{failed} of {len(checks)} checks failed."
    summary += f" The smallest cosine similarity of an output is {report.cosine:.6f}."
    if report.noise:
        summary += f" The unmodified model itself differs by {figures.error(report.noise)} between two runs."
    if report.diverged_at:
        summary += f" The first layer that differs is {report.diverged_at}."
    return {
        "passed": report.passed,
        "summary": summary,
        "checks": [
            {
                "passed": c.passed,
                "gate": str(c.gate),
                "name": c.name,
                "case": c.case,
                "detail": c.detail,
                "error": figures.error(c.error),
                "budget": figures.error(c.budget),
            }
            for c in shown
        ],
        "more": len(checks) - len(shown),
        "unchecked": report.unchecked,
    }


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else figures.number(value)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _unbroken(text: str) -> Markup:
    """Return escaped text in which no line ends inside a figure such as `1.1e-2`."""
    return Markup(re.sub(r"\b\d\.\de-\d+", r'<span class="unbroken">\g<0></span>', str(escape(text))))  # noqa: S704  # escaped


def _honesty(ceilings: list[reading.Ceiling]) -> str:
    measured = [c for c in ceilings if c.kept is not None]
    broken = [c for c in measured if c.kept is False]
    if not measured:
        return "None of these steps was measured alone."
    if not broken and len(measured) == 1:
        return "The one that was measured alone stayed under its bound."
    if not broken:
        return f"All {len(measured)} that were measured alone stayed under their bound."
    names = ", ".join(c.label for c in broken)
    return f"{len(broken)} of {len(measured)} measured alone beat its bound, so the bound was too low: {names}."


def _environment(plan: Plan) -> list[tuple[str, str]]:
    device = plan.device
    rows = [
        (
            "Device",
            f"{device.name} ({device.vendor}, {device.arch}), {device.num_devices} "
            + ("physical cores" if device.vendor == "cpu" else "devices"),
        ),
        ("Memory", f"{figures.size(device.memory_bytes)}, {figures.rate(device.bandwidth_bytes_per_s, 'B')}"),
        (
            "Peak rates",
            ", ".join(f"{k} {figures.rate(v, 'FLOP')}" for k, v in device.peak_flops.items()) or "not known",
        ),
        ("Where rates come from", ", ".join(f"{k}: {v}" for k, v in device.sources.items()) or "not recorded"),
        ("Features", ", ".join(device.features) or "none beyond the base"),
        (
            "Verified",
            "yes: the contract suite has run on this kind of hardware"
            if device.verified
            else "no: the contract suite has not been run on this kind of hardware, so treat its figures with care",
        ),
        ("Software", ", ".join(f"{k} {v}" for k, v in device.software.items())),
    ]
    telemetry = plan.chosen.measurement.telemetry if plan.chosen.measurement else {}
    if telemetry:
        rows.append(("While measuring", ", ".join(f"{k.replace('_', ' ')} {_plain(v)}" for k, v in telemetry.items())))
    spec = plan.workload
    rows += [
        (
            "Model",
            ", ".join(
                (
                    f"{figures.count(spec.parameters)} parameters",
                    figures.size(spec.parameter_bytes),
                    *(spec.dtypes or ("no floating-point parameters",)),
                    f"fingerprint {spec.fingerprint[:12]}",
                )
            ),
        ),
        (
            "Inputs",
            "; ".join(
                f"{name} ({figures.percent(spec.weights.get(name, 0.0))}): "
                + (", ".join(f"{s.dtype}{list(s.shape)}" for s in signature) or "no tensors")
                for name, signature in spec.signatures.items()
            ),
        ),
        ("Settings", ", ".join(f"{k} {v}" for k, v in plan.config.items() if v not in (None, [], ""))),
        (
            "Isolation",
            "each candidate ran in a process of its own"
            if all(t.isolation == "process" for t in plan.evidence)
            else "some candidates ran in the search's own process: a crash there would have ended the search",
        ),
    ]
    return rows
