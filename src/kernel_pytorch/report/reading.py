"""What a plan means, worked out once: the headline, the order of the trials, why each one lost, what to run next."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from kernel_pytorch.core.types import (
    Candidate,
    Gate,
    Measurement,
    Plan,
    Prediction,
    Ratio,
    Status,
    Step,
    Trial,
)
from kernel_pytorch.report import figures

__all__ = [
    "Ceiling",
    "Rung",
    "bounded",
    "ceilings",
    "headline",
    "ladder",
    "layers",
    "measured_error",
    "next_commands",
    "rank",
    "sentence",
    "short",
    "short_step",
    "speedup",
    "untried_by_reason",
    "why",
]

_ORDER = {Status.OK: 0, Status.WRONG: 1, Status.OOM: 2, Status.TIMEOUT: 3, Status.FAILED: 4}
_SAID_BY_NAME = re.compile(r"\b(\w+)=True\b")
_SAID_BY_VALUE = re.compile(r"\b\w+=(?!False\b|inf\b|nan\b)([A-Za-z][\w.-]*)")
_FLAGS = {"--resume", "--trust-remote-code", "--quiet", "--help"}


def short_step(step: Step | str) -> str:
    """Return a step, or its label, as people read it: `dtype(bfloat16)`, where a word says it without its name."""
    return _SAID_BY_VALUE.sub(r"\1", _SAID_BY_NAME.sub(r"\1", str(step)))


def short(candidate: Candidate) -> str:
    """Return a candidate as people read it: `dtype(bfloat16) + compile(default)`."""
    return " + ".join(map(short_step, candidate.steps)) or "unmodified"


def speedup(trial: Trial) -> Ratio | None:
    """Return the measured speed-up; the unmodified model without samples of its own is 1 by definition."""
    if trial.measurement is not None:
        return trial.measurement.ratio
    return None if trial.candidate.steps else Ratio(1.0, 1.0, 1.0)


def measured_error(trial: Trial) -> tuple[float, float] | None:
    """Return error and budget of what would ship; `None` where no output was compared with the oracle."""
    report = trial.numerics
    if report is None or not any(c.gate is Gate.PRECISION for c in report.checks):
        return None
    return report.max_rel_error, report.budget


def rank(plan: Plan) -> list[Trial]:
    """Return one trial per candidate, the chosen one first, then by speed-up, then those that are not usable.

    Of several trials of one candidate the last counts: a confirmation on fresh samples replaces the screening.
    """
    latest: dict[Candidate, Trial] = {}
    for trial in plan.evidence:
        latest[trial.candidate] = trial
    latest[plan.candidate] = plan.chosen

    def key(trial: Trial) -> tuple[bool, int, float]:
        ratio = speedup(trial)
        return trial.candidate != plan.candidate, _ORDER[trial.status], -ratio.value if ratio else 0.0

    return sorted(latest.values(), key=key)


def headline(plan: Plan) -> str:
    """Return the outcome in a few words."""
    ratio = speedup(plan.chosen)
    if not plan.candidate.steps or ratio is None:
        return "The unmodified model is kept"
    return f"{figures.times(ratio.value)} faster"


def sentence(plan: Plan) -> str:
    """Return the outcome as one sentence: the interval, the error and its budget, or why nothing won."""
    chosen = plan.chosen
    ratio = speedup(chosen)
    if plan.candidate.steps and ratio is not None:
        low, high = (figures.times(x).removesuffix("x") for x in (ratio.low, ratio.high))
        parts = [f"{ratio.confidence * 100:.0f} % interval {low} to {high}"]
        error = measured_error(chosen)
        if error is not None:
            parts.append(f"error {figures.error(error[0])} of {figures.error(error[1])} allowed")
        elif chosen.numerics is None:
            parts.append("numerics were not compared")
        return ", ".join(parts)
    tried = [t for t in rank(plan) if t.candidate.steps]
    if not tried:
        return "no candidate could be tried on this machine; see what was skipped, and the fixes"
    usable = [t for t in tried if t.status is Status.OK and t.measurement is not None]
    if not usable:
        return f"none of the {len(tried)} candidates tried computed the same thing and ran to the end"
    best, ratio = max(((t, t.measurement.ratio) for t in usable if t.measurement), key=lambda pair: pair[1].low)
    return (
        f"none of the {len(tried)} candidates tried was reliably faster; the best, {short(best.candidate)}, "
        f"measured {figures.interval(ratio)}"
    )


def why(plan: Plan, trial: Trial) -> str:
    """Return why a candidate won or lost; what the search wrote, else what its figures say."""
    if trial.reason:
        return trial.reason
    if not trial.candidate.steps:
        kept = trial.candidate == plan.candidate
        return "kept: nothing was reliably faster" if kept else "what everything else is compared with"
    if trial.candidate == plan.candidate:
        return "chosen"
    report = trial.numerics
    if report is not None and not report.passed and report.worst is not None:
        worst = report.worst
        error, budget = figures.error(worst.error), figures.error(worst.budget)
        return worst.detail or f"{worst.name}: error {error}, {budget} allowed"
    return _behind(speedup(trial), speedup(plan.chosen)) or f"{trial.status}: no reason was recorded"


def _behind(ratio: Ratio | None, best: Ratio | None) -> str:
    if ratio is None:
        return ""
    if ratio.high < 1.0:
        return "slower than the unmodified model"
    if ratio.low <= 1.0:
        return "no measurable difference from the unmodified model"
    if best is not None and ratio.value < best.value:
        return f"faster than the unmodified model, but behind the winner ({figures.times(best.value)})"
    return "faster when screened, but not chosen"


@dataclass(frozen=True, slots=True)
class Rung:
    """One measured stage on the way from the unmodified model to the chosen one.

    Attributes:
        added: Steps that this stage adds to the one before; more than one where they were not measured alone.
        ms: Time after this stage: the confirmed baseline time over the stage's own paired speed-up.
        ratio: That speed-up; `None` for the baseline.
    """

    added: tuple[Step, ...]
    ms: float
    ratio: Ratio | None


def ladder(plan: Plan) -> list[Rung]:
    """Return the longest chain of measured sub-candidates from the unmodified model to the chosen one."""
    final = plan.chosen.measurement
    if final is None or not plan.candidate.steps:
        return []
    order = plan.candidate.steps
    whole = frozenset(order)
    measured: dict[frozenset[Step], Measurement] = {}
    for trial in plan.evidence:
        steps = frozenset(trial.candidate.steps)
        if trial.measurement is not None and trial.status is Status.OK and steps and steps < whole:
            measured[steps] = trial.measurement
    prefixes = {frozenset(order[:n]) for n in range(1, len(order))}
    best: dict[frozenset[Step], list[frozenset[Step]]] = {}
    for steps in (*sorted(measured, key=lambda s: (len(s), s not in prefixes)), whole):
        below = max((chain for key, chain in best.items() if key < steps), key=len, default=[])
        best[steps] = [*below, steps]
    baseline_ms = final.baseline_median_ms
    rungs = [Rung((), baseline_ms, None)]
    done: frozenset[Step] = frozenset()
    for steps in best[whole]:
        ratio = final.ratio if steps == whole else measured[steps].ratio
        added = tuple(s for s in order if s in steps and s not in done)
        rungs.append(Rung(added, baseline_ms / ratio.value, ratio))
        done = steps
    return rungs


@dataclass(frozen=True, slots=True)
class Ceiling:
    """An upper bound that was predicted for one step, beside what it measured alone.

    Attributes:
        kept: Whether the measurement stayed under the bound (its interval reaches below it); `None` if not measured.
    """

    label: str
    bound: float
    measured: Ratio | None
    kept: bool | None


def ceilings(plan: Plan) -> list[Ceiling]:
    """Return every predicted ceiling with the measurement of that step alone, highest bound first."""
    alone = {t.candidate.label: t for t in rank(plan) if len(t.candidate.steps) == 1}
    rows = []
    for label, bound in bounded(plan.prediction):
        trial = alone.get(label)
        ratio = trial.measurement.ratio if trial is not None and trial.measurement is not None else None
        rows.append(Ceiling(short_step(label), bound, ratio, None if ratio is None else ratio.low <= bound))
    return rows


def layers(plan: Plan) -> Mapping[str, tuple[float, float]]:
    """Return time by top-level module before and after, of the last trial of the chosen candidate that has it."""
    for trial in (plan.chosen, *reversed(plan.evidence)):
        if trial.candidate == plan.candidate and trial.candidate.steps and trial.layers_ms:
            return trial.layers_ms
    return {}


def bounded(prediction: Prediction) -> list[tuple[str, float]]:
    """Return the predicted ceilings, highest first."""
    return sorted(prediction.ceilings.items(), key=lambda item: (-item[1], item[0]))


def untried_by_reason(plan: Plan) -> list[tuple[str, list[str]]]:
    """Return what was not tried as pairs of reason and candidates, in the order of the plan."""
    groups: dict[str, list[str]] = {}
    for entry in plan.untried:
        groups.setdefault(entry.reason, []).append(short(entry.candidate))
    return list(groups.items())


def next_commands(plan: Plan, directory: str) -> list[tuple[str, str]]:
    """Return what to run next, as pairs of purpose and command line.

    Args:
        plan: The plan.
        directory: Where the plan lies, for a plan that does not say where its search wrote it.
    """
    words = _words(plan.command)
    target = _positional(words[words.index("optimize") + 1 :]) if "optimize" in words else ""
    where = shlex.quote(_option(words, "-o", "--output") or directory)
    what = shlex.quote(target) if target else "TARGET"
    commands = [("Reproduce this search", plan.command)] if plan.command else []
    if plan.candidate.steps:
        commands += [
            ("Apply the plan to a fresh model, verify it and time it here", f"kpt apply {where} {what}"),
            ("Write the plan as plain PyTorch source", f"kpt eject {where} {what}"),
        ]
    else:
        commands.append(("Search longer", f"kpt optimize {what} --budget thorough -o {where}"))
    commands.append(("Read why each candidate won or lost", f"kpt explain {where}"))
    return commands


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # an open quotation: a command this package did not write
        return []


def _option(words: list[str], *names: str) -> str:
    return next((value for word, value in pairwise(words) if word in names), "")


def _positional(words: list[str]) -> str:
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word.startswith("-"):
            skip = "=" not in word and word not in _FLAGS
        else:
            return word
    return ""
