"""Is a plan still right, still faster than the unmodified model, and as much as it was? `kpt check`."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.types import DeviceSpec, Event, Listener, Measurement, Plan, Status, Trial, Verdict
from kernel_pytorch.core.workload import Workload
from kernel_pytorch.errors import KptError
from kernel_pytorch.guard.findings import Findings, planned
from kernel_pytorch.guard.plan_trial import Asked, Seen, as_payload, read_answer, read_samples, try_plan
from kernel_pytorch.guard.stale import differences, same_code, stamp
from kernel_pytorch.guard.types import Comparison
from kernel_pytorch.hardware import detect
from kernel_pytorch.measure.isolation import TravelError, Workers, WorkersUnavailableError, pack
from kernel_pytorch.measure.stats import paired_ratio

__all__ = ["Checked", "InterruptedCheck", "check_plan", "here"]

MAX_PAIRS = 400
_REFRESH_PAIRS = 100


class InterruptedCheck(KeyboardInterrupt):
    """Ctrl-C during a check.

    Attributes:
        comparison: What was sampled until then; INCONCLUSIVE.
    """

    def __init__(self, comparison: Comparison) -> None:
        super().__init__()
        self.comparison = comparison


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check has found.

    Attributes:
        comparison: The verdict with its evidence.
        trial: The plan's candidate as it was tried now; `None` where it was not.
        plan: The plan stamped anew, where that was asked for and it passed.
    """

    comparison: Comparison
    trial: Trial | None = None
    plan: Plan | None = None


def here(plan: Plan) -> DeviceSpec:
    """Return this machine's device of the plan's vendor, else its best one."""
    try:
        return detect(plan.device.vendor)
    except KptError:
        return detect()


def check_plan(
    plan: Plan,
    workload: Workload,
    config: KernelPyTorchConfig,
    *,
    artifacts: Path | None = None,
    max_slowdown: float = 0.03,
    keep: float = 0.9,
    max_seconds: float = 30.0,
    max_pairs: int = MAX_PAIRS,
    refresh: bool = False,
    keep_compiled: Path | None = None,
    again: str = "",
    name: str = "",
    command: str = "",
    listen: Listener | None = None,
) -> Checked:
    """Judge a plan here and now: first whether it is of this device and software, then its numerics, then its speed.

    Unmodified model and plan take turns, in a process of their own. The plan fails where it is slower than it owes by
    more than `max_slowdown`, and proven so. It owes the unmodified model's time over `keep` times the lower bound of
    its own speed-up, and never less than the unmodified model's time.

    Args:
        plan: The plan.
        workload: What it is for.
        config: The plan's configuration; its `isolation` says whether a process of its own is used.
        artifacts: The plan's `artifacts/`, where the user trusts the code in it.
        max_slowdown: The smallest slowdown that matters, as a fraction.
        keep: Share of the planned speed-up that must be left; 0 asks only for the unmodified model's time.
        max_seconds: Limit of the timing; numerics and compilation come before it.
        max_pairs: Pairs of samples at most.
        refresh: Judge a plan of other software too, on a number of pairs that is fixed, and stamp it where it passes.
        keep_compiled: Directory for what is compiled, as a plan's `artifacts/` holds it; nothing is kept by default.
        again: The command that refreshes, for the reason of STALE.
        name: What is checked, stable over time; by default the workload's name.
        command: What reproduces this.
        listen: Called with each `Event`, of kind `note` with a line for people.

    Raises:
        KptError: The workload or the plan cannot be used: another model, inputs that do not fit, bad arguments.
        InterruptedCheck: Ctrl-C.
    """
    if not 0.0 <= keep <= 1.0:
        raise KptError(f"keep must be between 0 and 1, got {keep}")
    began = time.monotonic()
    device = here(plan)
    build = Findings(plan, device, max_slowdown, name or plan.workload.name or "model", command, began)
    changed = differences(plan, device)
    if changed and not (refresh and same_code(plan, device)):
        return Checked(build.stale(changed, again))
    owed = max(1.0, keep * planned(plan).low) if plan.candidate.steps else 1.0
    with tempfile.TemporaryDirectory(prefix="kpt-check-") as scratch:
        asked = Asked(
            plan=plan,
            config=config,
            device=device.vendor,
            target=workload.target,
            packed="",
            artifacts="" if artifacts is None else str(artifacts),
            max_seconds=max_seconds,
            max_pairs=max(_REFRESH_PAIRS, len(_samples(plan))) if refresh else max_pairs,
            max_slowdown=max_slowdown,
            owed=owed,
            fixed=refresh,
            keep_compiled="" if keep_compiled is None else str(keep_compiled),
            samples=str(Path(scratch) / "samples.jsonl"),
        )
        if listen is not None:
            listen(Event("note", "checking numerics, then timing in turns", budget_s=max_seconds))
        try:
            seen = _run(asked, workload, Path(scratch))
        except KeyboardInterrupt as stop:
            partial = build.undecided("interrupted", read_samples(Path(asked.samples)))
            raise InterruptedCheck(partial) from stop
        samples = read_samples(Path(asked.samples))
    if isinstance(seen, str):
        return Checked(build.undecided(seen, samples))
    comparison = build.judged(seen, samples, owed, keep)
    if not refresh or comparison.verdict is not Verdict.PASS:
        return Checked(comparison, seen.trial)
    fresh = _as_evidence(seen, samples)
    return Checked(comparison, fresh, stamp(plan, fresh, device))


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


def _samples(plan: Plan) -> tuple[float, ...]:
    return plan.chosen.measurement.samples_ms if plan.chosen.measurement is not None else ()


def _as_evidence(seen: Seen, samples: tuple[tuple[float, ...], tuple[float, ...]]) -> Trial:
    base, head = samples
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
