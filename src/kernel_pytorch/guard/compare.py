"""Compare two sides, or two series: the one function behind `kpt compare`, `kpt check` and the pytest plugin."""

from __future__ import annotations

import datetime as dt
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from kernel_pytorch.backends import manager_for
from kernel_pytorch.core.types import Event, Listener, Ratio, Verdict
from kernel_pytorch.errors import KptError
from kernel_pytorch.guard.commands import CommandRunner
from kernel_pytorch.guard.processes import SideFailed, terminable
from kernel_pytorch.guard.series import SeriesError, check_series, read_series
from kernel_pytorch.guard.side_by_side import Limits, Run, Side, SideError, WorkerRunner, check_same, take_turns
from kernel_pytorch.guard.types import Comparison, SideFacts
from kernel_pytorch.measure.stats import paired_ratio
from kernel_pytorch.validation.regression import Judgement, Sequential, judge_pairs, judge_series

__all__ = ["compare_series", "compare_sides"]

_LOCK_PATIENCE_S = 1.0
_BUSY_CORES = 0.25


def compare_sides(
    base: Side,
    head: Side,
    *,
    max_slowdown: float = 0.03,
    max_seconds: float = 120.0,
    max_pairs: int = 400,
    name: str = "",
    profile: bool = True,
    same_model: bool = True,
    listen: Listener | None = None,
    command: str = "",
    limits: Limits | None = None,
    seed: int = 0,
) -> Comparison:
    """Run two sides in turns on this machine's device until the verdict is certain.

    Args:
        base: The old side.
        head: The new side.
        max_slowdown: The smallest slowdown that matters, as a fraction.
        max_seconds: Limit of warm-up and sampling together; loading and compiling come before it.
        max_pairs: Pairs of samples at most.
        name: What is compared, stable over time; by default the target or the command.
        profile: Whether each side is profiled where it failed.
        same_model: Whether two targets must be of the same structure, with inputs of the same shapes.
        listen: Called with each `Event`, of kind `note` with a line for people.
        command: What reproduces it.
        limits: Of loading, and of a call that hangs; its `sampling` is `max_seconds`.
        seed: Of the order in which turns are taken.

    Returns:
        The comparison. A side that crashes, hangs or raises makes it INCONCLUSIVE; what was sampled is kept.

    Raises:
        KptError: What a caller can mend: a target, a plan or an environment that is refused (`SideError`,
            `EnvironmentUnusableError`), sides that are not the same work (`NotComparableError`), bad arguments.
    """
    began = time.monotonic()
    if not max_seconds > 0.0 or max_pairs < 2:
        raise KptError(f"max_seconds must be above 0 and max_pairs at least 2, got {max_seconds} and {max_pairs}")
    if (base.command is None) != (head.command is None):
        raise KptError("one side is a target and the other a command", fix="give two of a kind")
    say = _speaker(listen, began, max_seconds)
    with ExitStack() as stack:
        stack.enter_context(terminable())
        runners: list[WorkerRunner | CommandRunner] = []
        for side in (base, head):
            runners.append(WorkerRunner(side) if side.command is None else CommandRunner(side))
            stack.callback(runners[-1].close)
        decision = _Decision(Sequential(max_slowdown, max_pairs))
        limits = replace(limits or Limits(), sampling=max_seconds)
        run = _load(runners, limits, say, same_model=same_model)
        if run.failure is None:
            stack.enter_context(_device(say))
            say("sampling in turns")
            run = take_turns(*runners, done=decision.reached, limits=limits, max_pairs=max_pairs, seed=seed)
        verdict, reason, change, notes = _outcome(run, decision)
        facts = [_facts(one, run, notes, profile=profile and verdict is Verdict.FAIL) for one in runners]
    return Comparison(
        kind="compare",
        name=name or _what(base),
        verdict=verdict,
        reason=reason,
        max_slowdown=max_slowdown,
        base=facts[0],
        head=facts[1],
        created=_now(),
        id=uuid.uuid4().hex,
        change=change,
        base_samples_ms=run.base_ms,
        head_samples_ms=run.head_ms,
        paired=True,
        notes=tuple(notes),
        command=command,
        seconds=time.monotonic() - began,
    )


def compare_series(
    base: Path | str | Sequence[float],
    head: Path | str | Sequence[float],
    *,
    paired: bool = False,
    max_slowdown: float = 0.03,
    name: str = "",
    command: str = "",
) -> Comparison:
    """Judge two series that were taken elsewhere.

    Args:
        base: Times of the old side in milliseconds, in time order, or a JSON file of them.
        head: Times of the new side.
        paired: Whether sample i of both was taken side by side.
        max_slowdown: The smallest slowdown that matters, as a fraction.
        name: What is compared, stable over time; by default the name of head's file.
        command: What reproduces it.

    Raises:
        SeriesError: A file that is no series, series that are too short, pairs of different lengths.
    """
    began = time.monotonic()
    labels = [str(one) if isinstance(one, str | Path) else label for one, label in ((base, "base"), (head, "head"))]
    series = [
        read_series(one) if isinstance(one, str | Path) else check_series(one, label)
        for one, label in ((base, labels[0]), (head, labels[1]))
    ]
    if paired and len(series[0]) != len(series[1]):
        raise SeriesError(
            f"{labels[0]} has {len(series[0])} samples and {labels[1]} {len(series[1])}: these are no pairs",
            fix="give series whose sample i was taken beside sample i of the other, or leave --paired out",
        )
    judge = judge_pairs if paired else judge_series
    judged = judge(series[0], series[1], max_slowdown=max_slowdown)
    default = Path(labels[1]).stem if isinstance(head, str | Path) else "series"
    return Comparison(
        kind="compare",
        name=name or default,
        verdict=judged.verdict,
        reason=judged.reason,
        max_slowdown=max_slowdown,
        base=SideFacts(labels[0]),
        head=SideFacts(labels[1]),
        created=_now(),
        id=uuid.uuid4().hex,
        change=judged.change,
        base_samples_ms=series[0],
        head_samples_ms=series[1],
        paired=paired,
        notes=judged.notes,
        command=command,
        seconds=time.monotonic() - began,
    )


@dataclass(slots=True)
class _Decision:
    """Looks at the pairs when they are due, and remembers what was decided."""

    sequential: Sequential
    judgement: Judgement | None = None

    def reached(self, base_ms: Sequence[float], head_ms: Sequence[float]) -> bool:
        self.judgement = self.sequential.look(base_ms, head_ms)
        return self.judgement is not None

    def final(self, run: Run) -> Judgement:
        if self.judgement is None:
            self.judgement = self.sequential.look(run.base_ms, run.head_ms, last=True)
        assert self.judgement is not None
        return self.judgement


def _load(
    runners: Sequence[WorkerRunner | CommandRunner], limits: Limits, say: Callable[[str], None], *, same_model: bool
) -> Run:
    """Load both sides, one after the other: each may choose kernels by measurement, undisturbed by the other."""
    try:
        for runner in runners:
            say(f"{runner.side.label}: loading {_what(runner.side)}")
            runner.load(limits)
    except SideFailed as failure:
        return Run(failure=failure)
    workers = [runner for runner in runners if isinstance(runner, WorkerRunner)]
    if same_model and workers:
        check_same(*workers)
    return Run()


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def _what(side: Side) -> str:
    return side.target or " ".join(side.command or ())


def _speaker(listen: Listener | None, began: float, budget_s: float) -> Callable[[str], None]:
    def say(message: str) -> None:
        if listen is not None:
            listen(Event("note", message, elapsed_s=time.monotonic() - began, budget_s=budget_s))

    return say


@contextmanager
def _device(say: Callable[[str], None]) -> Iterator[None]:
    """Hold the device's lock, and say so where another process holds it."""
    waiting = threading.Timer(_LOCK_PATIENCE_S, say, ("waiting: another measurement holds the device",))
    waiting.daemon = True
    waiting.start()
    try:
        with manager_for().exclusive():
            waiting.cancel()
            yield
    finally:
        waiting.cancel()


def _outcome(run: Run, decision: _Decision) -> tuple[Verdict, str, Ratio | None, list[str]]:
    notes = []
    if run.foreign_load_cores >= _BUSY_CORES:
        notes.append(f"other processes kept {run.foreign_load_cores:.1f} cores busy meanwhile")
    if run.failure is None:
        seen = decision.final(run)
        return seen.verdict, seen.reason, seen.change, [*seen.notes, *notes]
    change = paired_ratio(run.head_ms, run.base_ms) if run.head_ms else None
    if run.head_ms:
        notes.append(f"{len(run.head_ms)} pairs were sampled before it failed")
    if run.failure.tail:
        notes.append(f"it said last:\n{run.failure.tail}")
    return Verdict.INCONCLUSIVE, run.failure.reason, change, notes


def _facts(runner: WorkerRunner | CommandRunner, run: Run, notes: list[str], *, profile: bool) -> SideFacts:
    """Return a side's facts; one that fails while it is asked for the last of them is told of in the notes."""
    facts = runner.facts()
    if run.failure is None and isinstance(runner, WorkerRunner):
        try:
            facts = replace(facts, peak_bytes=runner.peak_bytes())
            facts = replace(facts, kernels_ms=runner.kernels_ms() if profile else {})
        except (SideFailed, SideError) as error:
            notes.append(f"not all is known of it: {error}")
    if not run.head_ms:
        return facts
    load = {"foreign_load_cores": run.foreign_load_cores, "warm_up_calls": float(run.warm_up_calls)}
    return replace(facts, telemetry={**facts.telemetry, **load})
