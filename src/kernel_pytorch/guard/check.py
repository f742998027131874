"""Is a plan still right, still faster than the unmodified model, and as much as it was? `kpt check`."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.types import DeviceSpec, Event, Listener, Measurement, Plan, Status, Trial, Verdict
from kernel_pytorch.core.workload import Workload
from kernel_pytorch.errors import KptError
from kernel_pytorch.guard.findings import Findings, Samples, planned
from kernel_pytorch.guard.fresh import FEWEST_PAIRS, MOST_PAIRS, Fresh, judge_fresh
from kernel_pytorch.guard.plan_trial import Asked, Seen, as_payload, read_answer, read_samples, try_plan
from kernel_pytorch.guard.stale import config_of, differences, same_code, stamp
from kernel_pytorch.guard.types import Comparison
from kernel_pytorch.hardware import detect
from kernel_pytorch.measure.isolation import TravelError, Workers, WorkersUnavailableError, pack
from kernel_pytorch.measure.stats import paired_ratio

__all__ = ["InterruptedCheck", "check_plan", "here", "refresh_plan"]

MAX_PAIRS = 2000
_REFRESH_PAIRS = 100
_SAMPLES = "samples-{}.jsonl"


class InterruptedCheck(KeyboardInterrupt):
    """Ctrl-C during a check.

    Attributes:
        comparison: What was sampled until then; INCONCLUSIVE.
    """

    def __init__(self, comparison: Comparison) -> None:
        super().__init__()
        self.comparison = comparison


def here(plan: Plan) -> DeviceSpec:
    """Return this machine's device of the plan's vendor, else its best one."""
    try:
        return detect(plan.device.vendor)
    except KptError:
        return detect()


def check_plan(
    plan: Plan,
    path: Path,
    workload: Workload,
    *,
    config: KernelPyTorchConfig | None = None,
    trust_artifacts: bool = False,
    max_slowdown: float = 0.03,
    keep: float = 0.9,
    max_seconds: float = 30.0,
    max_pairs: int = MAX_PAIRS,
    again: str = "",
    name: str = "",
    command: str = "",
    listen: Listener | None = None,
) -> Comparison:
    """Judge a plan here and now: first whether it is of this device and software, then its numerics, then its speed.

    Unmodified model and plan take turns, in a process of their own; where the plan is slow, again in three to eight
    fresh ones, by the rule of `guard.fresh`.
    It fails where it is slower than it owes by more than `max_slowdown`, and proven so. It owes the unmodified
    model's time over `keep` times the lower bound of its own speed-up, and never less than the unmodified model's.

    Args:
        plan: The plan.
        path: Its file, or the directory of its search.
        workload: What it is for.
        config: By default the plan's own; its `isolation` says whether a process of its own is used.
        trust_artifacts: Whether code in the plan's `artifacts/` may be loaded.
        max_slowdown: The smallest slowdown that matters, as a fraction.
        keep: Share of the planned speed-up that must be left; 0 asks only for the unmodified model's time.
        max_seconds: Limit of the timing; numerics and compilation come before it.
        max_pairs: Pairs of samples at most.
        again: The command that refreshes, for the reason of STALE.
        name: What is checked, stable over time; by default the workload's name and `(plan)`.
        command: What reproduces this.
        listen: Called with each `Event`, of kind `note` with a line for people.

    Raises:
        KptError: The workload or the plan cannot be used: another model, inputs that do not fit, bad arguments.
        InterruptedCheck: Ctrl-C.
    """
    findings, config = _begin(plan, config, keep, max_slowdown=max_slowdown, name=name, command=command)
    changed = differences(plan, findings.device)
    if changed:
        return findings.stale(changed, again)
    with tempfile.TemporaryDirectory(prefix="kpt-check-") as scratch:
        asked = Asked(
            plan=plan,
            config=config,
            device=findings.device.vendor,
            target=workload.target,
            packed="",
            artifacts=str(_artifacts(path)) if trust_artifacts else "",
            max_seconds=max_seconds,
            max_pairs=max_pairs,
            max_slowdown=max_slowdown,
            owed=_owed(plan, keep),
            fixed=False,
            level="standard",
            keep_compiled="",
            samples=str(Path(scratch) / _SAMPLES.format(0)),
        )
        _tell(listen, "numerics first, then both in turns", max_seconds)
        return _judged(asked, workload, Path(scratch), findings, listen)[0]


def refresh_plan(
    plan: Plan,
    workload: Workload,
    *,
    config: KernelPyTorchConfig | None = None,
    keep_compiled: Path | None = None,
    max_slowdown: float = 0.03,
    keep: float = 0.9,
    max_seconds: float = 30.0,
    name: str = "",
    command: str = "",
    listen: Listener | None = None,
) -> tuple[Comparison, Plan | None]:
    """Judge a plan here whatever software it was made with; return the plan stamped anew too, where it passes.

    The number of pairs is fixed beforehand, for they become the plan's evidence. Code in the plan's `artifacts/` is of
    the software before and is not used.

    Args:
        plan: As for `check_plan`, and so are the rest.
        workload: What it is for.
        config: By default the plan's own.
        keep_compiled: Directory for what is compiled, as a plan's `artifacts/` holds it; nothing is kept by default.
        max_slowdown: The smallest slowdown that matters.
        keep: Share of the planned speed-up that must be left.
        max_seconds: Limit of the timing.
        name: What is checked.
        command: What reproduces this.
        listen: Called with each `Event`.

    Raises:
        KptError: As `check_plan`.
        InterruptedCheck: Ctrl-C.
    """
    findings, config = _begin(plan, config, keep, max_slowdown=max_slowdown, name=name, command=command)
    if not same_code(plan, findings.device):
        return findings.stale(differences(plan, findings.device), ""), None
    measured = plan.chosen.measurement
    with tempfile.TemporaryDirectory(prefix="kpt-check-") as scratch:
        asked = Asked(
            plan=plan,
            config=config,
            device=findings.device.vendor,
            target=workload.target,
            packed="",
            artifacts="",
            max_seconds=max_seconds,
            max_pairs=max(_REFRESH_PAIRS, len(measured.samples_ms) if measured is not None else 0),
            max_slowdown=max_slowdown,
            owed=_owed(plan, keep),
            fixed=True,
            level="standard",
            keep_compiled="" if keep_compiled is None else str(keep_compiled),
            samples=str(Path(scratch) / _SAMPLES.format(0)),
        )
        _tell(listen, "numerics first, then both in turns", max_seconds)
        comparison, seen = _judged(asked, workload, Path(scratch), findings, listen)
    if comparison.verdict is not Verdict.PASS or seen is None:
        return comparison, None
    return comparison, stamp(plan, _as_evidence(seen, comparison), findings.device)


def _begin(
    plan: Plan, config: KernelPyTorchConfig | None, keep: float, *, max_slowdown: float, name: str, command: str
) -> tuple[Findings, KernelPyTorchConfig]:
    if not 0.0 <= keep <= 1.0:
        raise KptError(f"keep must be between 0 and 1, got {keep}")
    name = name or f"{plan.workload.name or 'model'} (plan)"
    findings = Findings(plan, here(plan), max_slowdown, keep, name, command, time.monotonic())
    return findings, config or config_of(plan)


def _owed(plan: Plan, keep: float) -> float:
    return max(1.0, keep * planned(plan).low) if plan.candidate.steps else 1.0


def _artifacts(path: Path) -> Path:
    return (path if path.is_dir() else path.parent) / "artifacts"


def _tell(listen: Listener | None, message: str, max_seconds: float) -> None:
    if listen is not None:
        listen(Event("note", message, budget_s=max_seconds))


def _judged(
    asked: Asked, workload: Workload, scratch: Path, findings: Findings, listen: Listener | None
) -> tuple[Comparison, Seen | None]:
    try:
        seen = _run(asked, workload, scratch)
        if isinstance(seen, str):
            return findings.undecided(seen, _sampled(scratch)), None
        if _is_slow(seen) and asked.config.isolation != "none":
            _tell(listen, "slower: sampling again in fresh processes", asked.max_seconds)
            seen = _confirmed(seen, asked, workload, scratch, listen)
    except KeyboardInterrupt as stop:
        raise InterruptedCheck(findings.undecided("interrupted", _sampled(scratch))) from stop
    return findings.judged(seen, _sampled(scratch), asked.owed), seen


def _is_slow(seen: Seen) -> bool:
    return seen.judgement is not None and seen.judgement.verdict is Verdict.FAIL


def _confirmed(seen: Seen, asked: Asked, workload: Workload, scratch: Path, listen: Listener | None) -> Seen:
    """Return what was seen after as many fresh processes as it takes (`guard.fresh`).

    A process may be slow for its own luck, where its memory lies; each runs the unmodified model and the plan in turns.
    """
    assert seen.judgement is not None
    pairs = max(FEWEST_PAIRS, min(len(_sampled(scratch)[0]), MOST_PAIRS))
    runs: list[Samples] = []
    fresh = judge_fresh(runs, asked.max_slowdown)
    more = replace(asked, fixed=True, level="quick", max_pairs=pairs, keep_compiled="")
    while not fresh.decided:
        file = scratch / _SAMPLES.format(1 + len(runs))
        again = _run(replace(more, samples=str(file)), workload, scratch)
        base, head = read_samples(file)
        if isinstance(again, str) or len(head) < FEWEST_PAIRS:
            told = again if isinstance(again, str) else again.trial.reason or "time was up"
            return _taken_back(seen, f"which a fresh process could not confirm: {told}")
        runs.append((tuple(ms / asked.owed for ms in base), head))
        fresh = judge_fresh(runs, asked.max_slowdown)
        if fresh.change is not None:
            _tell(listen, _shown(fresh, asked.owed), asked.max_seconds)
    if fresh.slower:
        return replace(seen, confirmed=_shown(fresh, asked.owed))
    return _taken_back(seen, f"which others do not prove ({_shown(fresh, asked.owed)})")


def _sampled(scratch: Path) -> Samples:
    """Return the pairs of all processes so far, in time order."""
    series = [read_samples(file) for file in sorted(scratch.glob(_SAMPLES.format("*")))]
    return tuple(ms for base, _ in series for ms in base), tuple(ms for _, head in series for ms in head)


def _shown(fresh: Fresh, owed: float) -> str:
    """Say what fresh processes show, as a speed-up over the unmodified model."""
    assert fresh.change is not None
    return f"{owed / fresh.change.value:.2f}x in {fresh.count} fresh processes"


def _taken_back(seen: Seen, reason: str) -> Seen:
    assert seen.judgement is not None
    return replace(seen, judgement=replace(seen.judgement, verdict=Verdict.INCONCLUSIVE, reason=reason))


def _run(asked: Asked, workload: Workload, scratch: Path) -> Seen | str:
    """Try the plan in a process of its own where that is possible; return what was seen, or why nothing was."""
    if asked.config.isolation == "none":
        return _run_here(asked, workload)
    try:
        if not asked.target:
            asked = replace(asked, packed=str(pack((workload,), scratch)))
        with Workers(preload=("torch", "numpy", "kernel_pytorch.guard.plan_trial")) as workers:
            outcome = workers.run(
                "kernel_pytorch.guard.plan_trial:run_job",
                as_payload(asked),
                timeout_s=_patience_s(asked),
                memory_limit_bytes=asked.config.memory_limit_bytes,
            )
    except (TravelError, WorkersUnavailableError):
        return _run_here(asked, workload)
    if outcome.status is Status.OK:
        return read_answer(outcome.value)
    return f"the process that ran the plan ended without an answer ({outcome.status}): {outcome.reason}"


def _run_here(asked: Asked, workload: Workload) -> Seen | str:
    try:
        return try_plan(asked, workload)
    except KptError:
        raise
    except Exception as error:  # noqa: BLE001  a model may raise anything while it is timed
        return f"raised while it was timed: {type(error).__name__}: {error}"


def _patience_s(asked: Asked) -> float:
    """Return the deadline of the process: a trial's, or three times what it took when planned, and the turns."""
    return max(asked.config.trial_timeout_s, 3.0 * asked.plan.chosen.seconds) + 2.0 * asked.max_seconds


def _as_evidence(seen: Seen, comparison: Comparison) -> Trial:
    base, head = comparison.base_samples_ms, comparison.head_samples_ms
    first = seen.trial.measurement
    assert first is not None
    measured = Measurement(
        samples_ms=head,
        baseline_samples_ms=base,
        ratio=paired_ratio(base, head),
        peak_bytes=first.peak_bytes,
        baseline_peak_bytes=first.baseline_peak_bytes,
        compile_seconds=first.compile_seconds,
        telemetry=seen.telemetry,
    )
    return replace(seen.trial, measurement=measured, phase="confirm")
