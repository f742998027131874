"""Compare two sides, or two series: the one function behind `kpt compare`, `kpt check` and the pytest plugin."""

from __future__ import annotations

import datetime as dt
import math
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
from kernel_pytorch.guard.culprit import find_culprits
from kernel_pytorch.guard.fresh import FEWEST_PAIRS, MOST_PAIRS, Fresh, judge_fresh
from kernel_pytorch.guard.kernel_names import condensed
from kernel_pytorch.guard.processes import SideFailed, terminable
from kernel_pytorch.guard.profile import profile_in_turns
from kernel_pytorch.guard.revisions import provenance
from kernel_pytorch.guard.series import SeriesError, check_series, read_series
from kernel_pytorch.guard.side_by_side import Limits, Side, SideError, WorkerRunner, check_same
from kernel_pytorch.guard.turns import Run, take_turns
from kernel_pytorch.guard.types import Comparison, SideFacts
from kernel_pytorch.measure.stats import paired_ratio
from kernel_pytorch.validation.regression import Judgement, Sequential, judge_pairs, judge_series

__all__ = ["InterruptedComparison", "compare_series", "compare_sides"]

_LOCK_PATIENCE_S = 1.0
_BUSY_CORES = 0.25


class InterruptedComparison(KeyboardInterrupt):
    """Ctrl-C, or SIGTERM, while samples were taken.

    Attributes:
        comparison: What was sampled until then; INCONCLUSIVE, unless the verdict had been reached.
    """

    def __init__(self, comparison: Comparison) -> None:
        super().__init__()
        self.comparison = comparison


def compare_sides(
    base: Side,
    head: Side,
    *,
    max_slowdown: float = 0.03,
    max_seconds: float = 120.0,
    max_pairs: int = 2000,
    name: str = "",
    profile: bool = True,
    same_model: bool = True,
    confirm: bool = True,
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
        name: What is compared, stable over time; by default head's target or command.
        profile: Whether each side is profiled where it failed, and the culprits are looked for.
        same_model: Whether two targets must be of the same structure, with inputs of the same shapes.
        confirm: Whether a slower target is sampled again, as long, in fresh processes before that is said: a process
            may be slow for its own luck (where its memory lies), which no number of samples of it tells.
        listen: Called with each `Event`, of kind `note` with a line for people.
        command: What reproduces it.
        limits: Of loading, and of a call that hangs; its `sampling` is `max_seconds`.
        seed: Of the order in which turns are taken.

    Returns:
        The comparison. A side that crashes, hangs or raises makes it INCONCLUSIVE; what was sampled is kept.

    Raises:
        KptError: What a caller can mend: a target, a plan or an environment that is refused (`SideError`,
            `EnvironmentUnusableError`), sides that are not the same work (`NotComparableError`), bad arguments.
        InterruptedComparison: Ctrl-C after samples were taken, with what there is of them.
    """
    began = time.monotonic()
    _check(base, head, max_slowdown, max_seconds, max_pairs)
    say = _speaker(listen, began, max_seconds)
    limits = replace(limits or Limits(), sampling=max_seconds)
    decision = _Decision(Sequential(max_slowdown, max_pairs))
    with terminable():
        with _sides(base, head) as runners:
            run = _load(runners, limits, say, same_model=same_model)
            if run.failure is None:
                with _device(say, base):
                    run = take_turns(*runners, done=decision.reached, limits=limits, max_pairs=max_pairs, seed=seed)
            found = _outcome(run, decision)
            fresh = confirm and found.verdict is Verdict.FAIL and base.command is None
            facts = _facts(runners, run, found, profile=profile and not fresh)
        if fresh and run.interrupted is None:
            say("slower: sampling again in fresh processes")
            limits = replace(limits, sampling=max(max_seconds / 2.0, run.seconds))
            asked = _Asked(base, head, limits, max_slowdown, same_model=same_model, profile=profile, seed=seed, say=say)
            found, run, facts = _in_fresh_processes(asked, run, found, facts)
    comparison = Comparison(
        kind="compare",
        name=name or _what(head),
        verdict=found.verdict,
        reason=found.reason,
        max_slowdown=max_slowdown,
        base=facts[0],
        head=facts[1],
        created=_now(),
        id=uuid.uuid4().hex,
        change=found.change,
        base_samples_ms=run.base_ms,
        head_samples_ms=run.head_ms,
        paired=True,
        notes=tuple(found.notes),
        command=command,
        seconds=time.monotonic() - began,
    )
    if run.interrupted is not None:
        if not run.head_ms:
            raise run.interrupted
        raise InterruptedComparison(comparison) from run.interrupted
    repository = head.avoid or head.directory
    return replace(comparison, culprits=find_culprits(comparison, repo=repository)) if profile else comparison


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
    """Load both sides, one after the other: each may choose kernels by measurement, undisturbed by the other.

    What both import before that, they import at the same time.
    """
    try:
        for runner in runners:
            if isinstance(runner, WorkerRunner):
                runner.begin()
        for runner in runners:
            doing = "loading" if runner.side.command is None else "running once:"
            say(f"{runner.side.label}: {doing} {_shown(runner.side)}")
            runner.load(limits)
    except SideFailed as failure:
        return Run(failure=failure)
    except (KeyboardInterrupt, SystemExit) as stop:
        return Run(failure=SideFailed("interrupted"), interrupted=stop)
    workers = [runner for runner in runners if isinstance(runner, WorkerRunner)]
    if same_model and workers:
        check_same(*workers)
    return Run()


def _check(base: Side, head: Side, max_slowdown: float, max_seconds: float, max_pairs: int) -> None:
    if not max_seconds > 0.0 or max_pairs < 2:
        raise KptError(f"max_seconds must be above 0 and max_pairs at least 2, got {max_seconds} and {max_pairs}")
    if not 0.0 < max_slowdown < math.inf:
        raise KptError(f"max_slowdown must be above 0, got {max_slowdown}")
    if (base.command is None) != (head.command is None):
        raise KptError("one side is a target and the other a command", fix="give two of a kind")


@contextmanager
def _sides(base: Side, head: Side) -> Iterator[tuple[WorkerRunner | CommandRunner, WorkerRunner | CommandRunner]]:
    """Yield what runs each side, not started yet; ends whatever was started."""
    with ExitStack() as stack:
        found: list[WorkerRunner | CommandRunner] = []
        for side in (base, head):
            found.append(WorkerRunner(side) if side.command is None else CommandRunner(side))
            stack.callback(found[-1].close)
        yield found[0], found[1]


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def _what(side: Side) -> str:
    return side.target or " ".join(side.command or ())


def _shown(side: Side) -> str:
    """Return what a side runs, without the path of a worktree that will soon be gone."""
    what = _what(side)
    if side.avoid is None or not side.revision:
        return what
    return f"{what.removeprefix(f'{side.directory}/')} of {side.revision[:10]}"


def _speaker(listen: Listener | None, began: float, budget_s: float) -> Callable[[str], None]:
    def say(message: str) -> None:
        if listen is not None:
            listen(Event("note", message, elapsed_s=time.monotonic() - began, budget_s=budget_s))

    return say


@contextmanager
def _device(say: Callable[[str], None], side: Side) -> Iterator[None]:
    """Hold the device's lock, and say so where another process holds it; a command may have to take it itself."""
    if side.command is not None:
        say("sampling in turns")
        yield
        return
    waiting = threading.Timer(_LOCK_PATIENCE_S, say, ("waiting: another measurement holds the device",))
    waiting.daemon = True
    waiting.start()
    try:
        with manager_for().exclusive():
            waiting.cancel()
            say("sampling in turns")
            yield
    finally:
        waiting.cancel()


@dataclass(slots=True)
class _Found:
    """What a run says."""

    verdict: Verdict
    reason: str
    change: Ratio | None
    notes: list[str]


def _outcome(run: Run, decision: _Decision) -> _Found:
    notes = []
    if run.foreign_load_cores >= _BUSY_CORES:
        notes.append(f"other processes kept {run.foreign_load_cores:.1f} cores busy meanwhile")
    if run.failure is None:
        seen = decision.final(run)
        return _Found(seen.verdict, seen.reason, seen.change, [*seen.notes, *notes])
    change = paired_ratio(run.head_ms, run.base_ms) if run.head_ms else None
    return _Found(Verdict.INCONCLUSIVE, run.failure.reason, change, [*notes, *_told(run.failure, len(run.head_ms))])


def _told(failure: SideFailed, pairs: int) -> list[str]:
    kept = [f"{pairs} pairs were sampled before it failed"] if pairs else []
    return [*kept, f"it said last:\n{failure.tail}"] if failure.tail else kept


@dataclass(frozen=True, slots=True)
class _Asked:
    """What fresh processes are asked for."""

    base: Side
    head: Side
    limits: Limits
    max_slowdown: float
    same_model: bool
    profile: bool
    seed: int
    say: Callable[[str], None]


def _in_fresh_processes(
    asked: _Asked, run: Run, found: _Found, facts: list[SideFacts]
) -> tuple[_Found, Run, list[SideFacts]]:
    """Return the outcome, all samples and the facts after as many fresh pairs of processes as it takes."""
    pairs = max(FEWEST_PAIRS, min(len(run.base_ms), MOST_PAIRS))
    seen: list[tuple[Sequence[float], Sequence[float]]] = []
    fresh, again = judge_fresh(seen, asked.max_slowdown), run
    while not fresh.decided and again.failure is None:
        with _sides(asked.base, asked.head) as runners:
            again = _load(runners, asked.limits, asked.say, same_model=asked.same_model)
            if again.failure is None:
                with _device(asked.say, asked.base):
                    seed = asked.seed + 1 + len(seen)
                    again = take_turns(*runners, done=_never, limits=asked.limits, max_pairs=pairs, seed=seed)
            run = _joined(run, again)
            if again.failure is None and len(again.base_ms) < FEWEST_PAIRS:
                again.failure = SideFailed("time was up")
            if again.failure is None:
                seen.append((again.base_ms, again.head_ms))
                fresh = judge_fresh(seen, asked.max_slowdown)
                asked.say(fresh.told)
                if fresh.decided:
                    facts = _facts(runners, run, found, profile=asked.profile and fresh.slower)
    return _confirmed(found, fresh, again), run, facts


def _confirmed(found: _Found, fresh: Fresh, again: Run) -> _Found:
    """Return the outcome after fresh pairs of processes, the last of which is `again`."""
    assert found.change is not None
    seen = f"{100.0 * (found.change.value - 1.0):+.1f} %"
    if again.failure is not None:
        reason = f"the head was slower ({seen}), which fresh processes could not confirm: {again.failure.reason}"
        notes = _told(again.failure, len(again.head_ms))
        return _Found(Verdict.INCONCLUSIVE, reason, found.change, [*found.notes, *notes])
    if fresh.slower:
        return replace(found, reason=f"{found.reason}; confirmed by {fresh.told}")
    reason = f"the head was slower in one pair of processes ({seen}), which others do not prove ({fresh.told})"
    return replace(found, verdict=Verdict.INCONCLUSIVE, reason=reason)


def _never(base_ms: Sequence[float], head_ms: Sequence[float]) -> bool:  # noqa: ARG001  all pairs are taken
    return False


def _joined(run: Run, again: Run) -> Run:
    """Return both runs as one."""
    return replace(
        again,
        base_ms=run.base_ms + again.base_ms,
        head_ms=run.head_ms + again.head_ms,
        foreign_load_cores=max(run.foreign_load_cores, again.foreign_load_cores),
    )


def _facts(
    runners: Sequence[WorkerRunner | CommandRunner], run: Run, found: _Found, *, profile: bool
) -> list[SideFacts]:
    """Return the facts of both sides; what fails while the last of them are asked for is told of in the notes."""
    peaks: dict[str, int | None] = {}
    profiles: list[dict[str, float]] = [{}, {}]
    workers = [one for one in runners if isinstance(one, WorkerRunner)] if run.failure is None else []
    try:
        names = {name for one in workers for name in one.told["software"]}
        for one in workers:
            one.complete(names)
            one.count()
            peaks[one.side.label] = one.peak_bytes()
        if profile and workers and found.verdict is Verdict.FAIL:
            profiles = [condensed(seen) for seen in profile_in_turns(*(one.kernels_ms for one in workers))]
    except (SideFailed, SideError) as error:
        found.notes.append(f"not all is known of it: {error}")
    except (KeyboardInterrupt, SystemExit) as stop:
        run.interrupted = stop
    return [
        _with_provenance(
            replace(
                facts := one.facts(),
                peak_bytes=peaks.get(one.side.label),
                kernels_ms=kernels_ms,
                telemetry={**_surroundings(run), **facts.telemetry},
            ),
            one,
        )
        for one, kernels_ms in zip(runners, profiles, strict=True)
    ]


def _surroundings(run: Run) -> dict[str, float]:
    """Return what is known of both sides together."""
    if not run.head_ms:
        return {}
    return {"foreign_load_cores": run.foreign_load_cores, "warm_up_calls": float(run.warm_up_calls)}


def _with_provenance(facts: SideFacts, runner: WorkerRunner | CommandRunner) -> SideFacts:
    """Say which commit the side's code is of, where it is not a worktree of one, and which this package there."""
    side = runner.side
    if not facts.revision:
        path, colon, _ = (side.target or "").rpartition(":")
        place = Path(path) if colon and path.endswith(".py") else Path()
        commit, dirty = provenance((side.directory or Path.cwd()) / place)
        facts = replace(facts, revision=commit, dirty=dirty)
    if isinstance(runner, WorkerRunner) and side.avoid is None and runner.told:
        commit, dirty = provenance(Path(runner.told["package"]))
        if commit:
            version = f"{facts.software['kernel_pytorch']}+g{commit[:12]}{'.dirty' if dirty else ''}"
            facts = replace(facts, software={**facts.software, "kernel_pytorch": version})
    return facts
