"""Judge a candidate factor by factor, because a low-precision budget hides bugs.

Gates in order, each run only where those before it passed: contract, structure (fp64, perturbed state, varied inputs),
kernel (quantised operands), precision (what ships against fp64), training (gradients and a short loss curve).
`docs/numerics.md` explains each budget.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from kernel_pytorch.core.program import clone_call, clone_model
from kernel_pytorch.core.types import Check, Gate, Mode, NumericsReport, Step
from kernel_pytorch.validation.contract import module_checks, sequence_checks
from kernel_pytorch.validation.full_size import full_size_checks
from kernel_pytorch.validation.kernel import kernel_checks
from kernel_pytorch.validation.oracle import Oracle
from kernel_pytorch.validation.precision import Budgets, budgets, precision_checks
from kernel_pytorch.validation.randomness import draws, randomness_checks
from kernel_pytorch.validation.recompile import compiled_frames, fail_on_recompile_limit, keeps_recompiling
from kernel_pytorch.validation.shorten import is_large, short_subject
from kernel_pytorch.validation.structure import structure
from kernel_pytorch.validation.subject import Memo, Observed, Subject, attempt, observe, run, seeded
from kernel_pytorch.validation.training import training_checks

__all__ = ["Subject", "judge"]


_EVALUATED = 0.5
"""What an output may differ by where the user's own accuracy is the budget: more than rounding, less than noise."""


class _Report:
    """Gathers checks gate by gate."""

    def __init__(self) -> None:
        self.checks: list[Check] = []
        self.unchecked: list[str] = []
        self.cosine = 1.0
        self.noise = 0.0
        self.diverged_at = ""

    @property
    def failed(self) -> bool:
        return any(not c.passed for c in self.checks)

    def done(self) -> NumericsReport:
        ordered = sorted(self.checks, key=lambda c: -(c.error / c.budget if c.budget else c.error))
        return NumericsReport(
            checks=tuple(ordered),
            unchecked=tuple(dict.fromkeys(self.unchecked)),
            diverged_at=self.diverged_at,
            cosine=self.cosine,
            noise=self.noise,
        )


def judge(subject: Subject, *, level: str = "standard") -> NumericsReport:
    """Compare a candidate with the unmodified model; a large one by a stand-in, and then at full size.

    Args:
        subject: The candidate applied, the unmodified model, and how to apply steps to other copies.
        level: `quick` (contract and precision), `standard` (every gate), `strict` (more inputs and seeds).

    Raises:
        ModelError: The unmodified model itself raises or gives NaN.
    """
    if level not in ("quick", "standard", "strict"):
        raise ValueError(f"level must be quick, standard or strict, got {level!r}")
    if is_large(subject.reference):
        short, left_out = short_subject(subject)
        if short is not None:
            return _judge_by_stand_in(subject, short, left_out, level)
    return _judge_whole(subject, level)


def _judge_by_stand_in(subject: Subject, short: Subject, left_out: str, level: str) -> NumericsReport:
    report = _judge_whole(short, level)
    unchecked = [*report.unchecked, left_out]
    if not report.passed:
        return replace(report, unchecked=tuple(unchecked))
    exact = all(map(subject.structural, subject.candidate.steps))
    with fail_on_recompile_limit():
        checks = full_size_checks(subject, report, unchecked, exact=exact)
    return replace(report, checks=(*report.checks, *checks), unchecked=tuple(unchecked))


def _judge_whole(subject: Subject, level: str) -> NumericsReport:
    report = _Report()
    config = subject.config
    oracle = Oracle(
        subject.workload, subject.reference, config.mode, subject.place, Memo(subject.memo_dir),
        seed=config.seed, level=level,
    )  # fmt: skip
    low = [s for s in subject.candidate.steps if not subject.structural(s)]
    with fail_on_recompile_limit():
        seen = _contract(subject, oracle, report, exact=not low)
    if not report.failed and level != "quick":
        verdict = structure(subject, oracle, level)
        report.checks += verdict.checks
        report.unchecked += verdict.unchecked
        report.diverged_at = verdict.diverged_at
    first = next(iter(subject.workload.cases))
    if not report.failed and level != "quick" and low:
        report.checks += kernel_checks(subject.program.model, subject.reference, oracle.call(first, 0), config.mode)
    _precision(subject, oracle, report, {k: v for k, v in seen.items() if _comparable(v, oracle.observed(k))}, low)
    if not report.failed and config.mode is Mode.TRAINING:
        with fail_on_recompile_limit():
            report.checks += training_checks(subject, oracle, level, low, drew=oracle.observed(first).drew)
    report.unchecked += oracle.unchecked
    return report.done()


def _comparable(got: Observed, want: Observed) -> bool:
    """Return whether outputs exist with the right structure: their error is told even where another gate failed."""
    return not got.error and all(a.kinds == b.kinds for a, b in zip(got.outputs, want.outputs, strict=True))


def _indices(oracle: Oracle, case: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the calls of a case with distinct inputs, and the pairs with equal ones."""
    first: dict[int, int] = {}
    pairs = []
    for i, (_, seed) in enumerate(oracle.calls(case)):
        if seed in first:
            pairs.append((first[seed], i))
        else:
            first[seed] = i
    return list(first.values()), pairs


def _contract(subject: Subject, oracle: Oracle, report: _Report, *, exact: bool) -> dict[str, Observed]:
    config, model = subject.config, subject.program.model
    report.checks += module_checks(model, subject.reference, config.mode, same_dtypes=exact)
    seen: dict[str, Observed] = {}
    for case in subject.workload.cases:
        want = oracle.observed(case)
        noise = oracle.noise(case)
        report.noise = max(report.noise, noise)
        frames = compiled_frames()
        _align(model, subject.reference, want)
        seen[case] = observe(model, oracle.calls(case), config.mode)
        _align(model, subject.reference, want)
        if compiled_frames() != frames and not seen[case].error:
            report.checks.append(_settles(subject, oracle, case))
        _, repeats = _indices(oracle, case)
        report.checks += sequence_checks(
            seen[case], want, case, repeats=repeats, tolerance=1e-4 if exact else config.max_error, noise=noise
        )
        if want.drew and not report.failed:
            _randomness(subject, oracle, report, case)
    return seen


def _align(model: nn.Module, reference: nn.Module, want: Observed) -> None:
    """Give running statistics the reference's values: a candidate may have been called before, and will be again."""
    theirs = dict(reference.named_buffers())
    with torch.no_grad():
        for name, mine in model.named_buffers():
            if name in want.deltas and mine.shape == theirs[name].shape:
                mine.copy_(theirs[name])


def _settles(subject: Subject, oracle: Oracle, case: str) -> Check:
    given, seed = oracle.calls(case)[0]
    model, mode = subject.program.model, subject.config.mode
    again, error = attempt(lambda: keeps_recompiling(lambda: run(model, clone_call(given), mode, seed)))
    detail = "compiles anew in every call, up to the limit beyond which it runs eagerly" if again else error
    return Check("recompiles", Gate.CONTRACT, math.inf if detail else 0.0, 0.0, detail, case)


def _randomness(subject: Subject, oracle: Oracle, report: _Report, case: str) -> None:
    call, seed = oracle.calls(case)[0]
    mode = subject.config.mode
    want = oracle.memo.get(
        f"draws {oracle.identity} {case} {seed}", lambda: draws(clone_model(subject.reference), call, mode, seed)
    )
    got, error = attempt(lambda: draws(subject.program.model, call, mode, seed + 1))
    if error:
        report.checks.append(Check("randomness", Gate.CONTRACT, math.inf, 0.0, error, case))
        return
    report.checks += randomness_checks(got, want, case, tolerance=subject.config.max_error)


def _precision(subject: Subject, oracle: Oracle, report: _Report, seen: dict[str, Observed], low: list[Step]) -> None:
    evaluated = subject.workload.evaluate is not None
    for case, got in seen.items():
        if oracle.observed(case).drew:
            report.unchecked.append(f"{case}: single outputs, for the model draws random numbers; moments are compared")
            continue
        distinct, _ = _indices(oracle, case)
        limits = budgets(oracle, case, distinct, low, max_error=subject.config.max_error, noise=report.noise)
        if evaluated:
            limits = Budgets({k: max(v, _EVALUATED) for k, v in limits.allowed.items()}, limits.own)
        checks, cosine = precision_checks(got, oracle, case, distinct, limits)
        report.checks += checks
        report.cosine = min(report.cosine, cosine)
    if evaluated and not report.failed:
        report.checks.append(_evaluation(subject, oracle))


def _evaluation(subject: Subject, oracle: Oracle) -> Check:
    """Return how much of the user's own accuracy is lost."""
    workload = subject.workload
    assert workload.evaluate is not None
    evaluate = workload.evaluate

    def score(model: nn.Module) -> float:
        with seeded(subject.config.seed), torch.set_grad_enabled(subject.config.mode is Mode.TRAINING):
            return float(evaluate(model))

    want = oracle.memo.get(f"evaluate {oracle.identity}", lambda: score(clone_model(subject.reference)))
    got, error = attempt(lambda: score(subject.program.model))
    if error:
        return Check("evaluate", Gate.PRECISION, math.inf, workload.evaluate_tolerance, f"raises {error}")
    lost = max(0.0, want - got) if math.isfinite(got) else math.inf
    detail = f"{got:g} of {want:g}" if lost > workload.evaluate_tolerance else ""
    return Check("evaluate", Gate.PRECISION, lost, workload.evaluate_tolerance, detail)
