"""`kpt explain`, `kpt apply`, `kpt validate` and `kpt eject`: what is done with a plan, or with two models."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_pytorch.cli.output import emit, quiet_stdout
from kernel_pytorch.core.types import Candidate, NumericsReport, Plan, Status, Trial
from kernel_pytorch.guard.stale import config_of
from kernel_pytorch.plan.store import load_plan, write_text

if TYPE_CHECKING:
    from torch import nn

    from kernel_pytorch.core.config import KernelPyTorchConfig
    from kernel_pytorch.core.protocols import Program

__all__ = ["apply", "eject", "explain", "validate"]


def explain(*, plan: str, form: str) -> int:
    """Print why each candidate won or lost."""
    loaded = load_plan(plan)

    def data() -> dict[str, Any]:
        from kernel_pytorch.report.json import explain as as_json

        return as_json(loaded)

    def text(console: Any) -> None:
        from kernel_pytorch.report.text import render_plan

        render_plan(loaded, console)

    emit(form, data, text)
    return 0


def apply(
    *, plan: str, target: str, budget: float, seed: int, trust_artifacts: bool, trust_remote_code: bool, form: str
) -> int:
    """Replay a plan on a fresh model; return 1 where it is wrong or not faster here and now."""
    loaded = load_plan(plan)
    with quiet_stdout():
        config = config_of(loaded).but(seed=seed, trust_remote_code=trust_remote_code)
        trial = _replay(loaded, Path(plan), target, config, seconds=budget, trust_artifacts=trust_artifacts)
    findings = _findings(loaded, trial)

    def data() -> dict[str, Any]:
        from kernel_pytorch.report.json import explain as as_json

        return {
            "holds": not findings,
            "findings": findings,
            "planned": _interval(loaded.chosen),
            "measured": _interval(trial),
            **{k: v for k, v in as_json(replace(loaded, chosen=trial)).items() if k in ("chosen", "numerics")},
        }

    def text(console: Any) -> None:
        verdict = "holds" if not findings else "no longer holds"
        console.print(f"{loaded.candidate.label}: {verdict}", style="bold green" if not findings else "bold red")
        console.print(f"in the plan  {_told(loaded.chosen)}\nhere and now {_told(trial)}")
        for finding in findings:
            console.print(f"- {finding}")

    emit(form, data, text)
    return 1 if findings else 0


def _replay(
    plan: Plan, path: Path, target: str, config: KernelPyTorchConfig, *, seconds: float, trust_artifacts: bool
) -> Trial:
    from kernel_pytorch.backends import manager_for
    from kernel_pytorch.catalog import apply_candidate
    from kernel_pytorch.core.describe import check_model as check_sanity
    from kernel_pytorch.core.targets import load_target
    from kernel_pytorch.guard.check import here
    from kernel_pytorch.plan.apply import check_device, check_model, load_compiled
    from kernel_pytorch.search.bench import build, prepare_bench
    from kernel_pytorch.search.trial import TrialRequest, run_trial

    manager = manager_for(here(plan).vendor)
    check_device(plan, manager.spec)
    workload = load_target(target, trust_remote_code=config.trust_remote_code)
    bench = prepare_bench(workload, config, manager, seed=config.seed)
    check_model(plan, bench.model)
    check_sanity(bench.workload, bench.model, bench.calls, config.mode, bench.batches)
    artifacts = (path if path.is_dir() else path.parent) / "artifacts"

    def deployed(model: nn.Module) -> Program:
        program = build(bench, model, Candidate())
        program.artifact_dir, program.trust_artifacts = artifacts, True
        load_compiled(program, manager.spec)
        return apply_candidate(program, plan.candidate, bench.transforms)

    request = TrialRequest(plan.candidate, phase="confirm", seconds=seconds, seed=config.seed)
    return run_trial(bench, request, deployed if trust_artifacts else None)


def _findings(plan: Plan, trial: Trial) -> list[str]:
    if trial.status is not Status.OK:
        return [f"{trial.status}: {trial.reason}"]
    if not plan.candidate.steps or trial.measurement is None:
        return []
    ratio = trial.measurement.ratio
    if ratio.low > 1.0:
        return []
    return [f"not faster than the unmodified model: {_told(trial)}"]


def _interval(trial: Trial) -> dict[str, float] | None:
    if trial.measurement is None:
        return None
    ratio = trial.measurement.ratio
    return {"speedup": ratio.value, "speedup_low": ratio.low, "speedup_high": ratio.high}


def _told(trial: Trial) -> str:
    if trial.measurement is None:
        return "not measured"
    m = trial.measurement
    return (
        f"{m.ratio.value:.2f}x ({m.ratio.low:.2f} to {m.ratio.high:.2f}): "
        f"{m.baseline_median_ms:.3g} ms unmodified, {m.median_ms:.3g} ms with the plan"
    )


def validate(
    *, target_a: str, target_b: str, level: str, max_error: float, seed: int, trust_remote_code: bool, form: str
) -> int:
    """Compare two models on the inputs of the first; return 1 where they differ."""
    with quiet_stdout():
        import torch

        from kernel_pytorch.core.config import KernelPyTorchConfig
        from kernel_pytorch.core.targets import load_target
        from kernel_pytorch.plan.schema import plain
        from kernel_pytorch.validation.unified_validator import UnifiedValidator

        config = KernelPyTorchConfig(max_error=max_error, seed=seed)
        models = []
        for target in (target_a, target_b):
            torch.manual_seed(seed)  # random weights are the same on both sides
            workload = load_target(target, trust_remote_code=trust_remote_code)
            models.append((workload, workload.model().eval()))
        (first, reference), (_, candidate) = models
        validator = UnifiedValidator(config)
        reports = {
            name: validator.validate(candidate, reference, first.call(name, seed), level=level) for name in first.cases
        }
        report = _function_only(_merged(reports))

    def data() -> dict[str, Any]:
        return {
            "same": report.passed,
            "diverged_at": report.diverged_at,
            "max_rel_error": plain(report.max_rel_error),
            "cosine": plain(report.cosine),
            "checks": [{**plain(c), "passed": c.passed} for c in report.checks],
            "unchecked": list(report.unchecked),
        }

    def text(console: Any) -> None:
        from kernel_pytorch.report.text import render_numerics

        render_numerics(report, console)

    emit(form, data, text)
    return 0 if report.passed else 1


def _function_only(report: NumericsReport) -> NumericsReport:
    """Return the report without what two models may differ in and still be one function: class and parameter names."""
    names = [c for c in report.checks if c.name.partition(" ")[0] in ("class", "state_dict") and not c.passed]
    said = tuple(f"{c.name} {c.detail} (of the candidate; it makes no other function)" for c in names)
    return replace(
        report,
        checks=tuple(c for c in report.checks if c not in names),
        unchecked=(*report.unchecked, *dict.fromkeys(said)),
    )


def _merged(reports: dict[str, NumericsReport]) -> NumericsReport:
    every = list(reports.values())
    return NumericsReport(
        checks=tuple(
            replace(c, case=name if c.case in ("", "main") else f"{name}, {c.case}") if len(reports) > 1 else c
            for name, report in reports.items()
            for c in report.checks
        ),
        unchecked=tuple(dict.fromkeys(u for r in every for u in r.unchecked)),
        diverged_at=next((r.diverged_at for r in every if r.diverged_at), ""),
        cosine=min(r.cosine for r in every),
        noise=max(r.noise for r in every),
    )


def eject(*, plan: str, target: str, output: str | None, trust_remote_code: bool, form: str) -> int:
    """Print the plan as plain PyTorch source."""
    loaded = load_plan(plan)
    with quiet_stdout():
        from kernel_pytorch.core.targets import load_target
        from kernel_pytorch.plan.apply import check_model
        from kernel_pytorch.plan.eject import eject as as_source

        check_model(loaded, load_target(target, trust_remote_code=trust_remote_code).model())
        source = as_source(loaded, target)
    if output:
        write_text(Path(output).absolute(), source)
        return 0
    if form == "json":
        emit(form, lambda: {"source": source}, lambda _: None)
    else:
        sys.stdout.write(source)
    return 0
