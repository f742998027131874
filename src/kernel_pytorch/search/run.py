"""The search itself: try what the strategy proposes until the budget is spent, then confirm on fresh samples."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.types import Candidate, Event, Listener, Prediction, Status, Trial, Untried
from kernel_pytorch.measure.stats import confirm_pairs
from kernel_pytorch.plan.compile_cache import discard
from kernel_pytorch.search.choose import finalists, is_confirmed, why_not
from kernel_pytorch.search.jobs import Jobs
from kernel_pytorch.search.propose import Proposals
from kernel_pytorch.search.strategy import Strategy
from kernel_pytorch.search.trial import TrialRequest

__all__ = ["Outcome", "Search"]

_SCREEN_SHARE = 0.02
_CONFIRM_SHARE = 0.06
_SEED_OF_CONFIRMATION = 7919
_CACHED = 0.8


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a search found: the confirming trial of the choice, all trials, and what was not tried."""

    chosen: Trial
    evidence: tuple[Trial, ...]
    untried: tuple[Untried, ...]


@dataclass(slots=True)
class Search:
    """One search over one workload.

    Attributes:
        jobs: Runs trials.
        proposals: What could be done.
        prediction: Orders and prunes it.
        config: Budget, minimum gain, seed.
        listen: Told what happens.
        journal: Called with every finished trial before the next one starts.
        finished: Trials of an interrupted search, not run again.
        artifact_dir: Where the confirmation keeps what it compiles, for the plan to carry; empty keeps nothing.
        started: When the search began, on `time.monotonic`'s clock; its budget counts from there.
    """

    jobs: Jobs
    proposals: Proposals
    prediction: Prediction
    config: KernelPyTorchConfig
    listen: Listener
    journal: Callable[[Trial], None]
    finished: tuple[Trial, ...] = ()
    artifact_dir: str = ""
    started: float = field(default_factory=time.monotonic)
    evidence: list[Trial] = field(default_factory=list)

    def run(self) -> Outcome:
        """Search, confirm, and return the outcome; never raises for a candidate."""
        strategy = Strategy(self.proposals, self.prediction.ceilings, self.config.min_gain)
        for trial in self.finished:
            self.evidence.append(trial)
            if trial.phase == "screen":
                strategy.record(trial)
        if not any(t.candidate == Candidate() for t in self.evidence):
            self._try(Candidate(), "screen")
        candidate = strategy.next()
        while candidate is not None and self._time_left() > self._reserve():
            strategy.record(self._try(candidate, "screen"))
            candidate = strategy.next()
        chosen = self._confirm()
        evidence = tuple(self._explained(t, chosen.candidate, strategy) for t in self.evidence)
        reason = f"the budget of {self._budget_s:.0f} s was spent"
        return Outcome(chosen, evidence, strategy.untried(reason))

    @property
    def _budget_s(self) -> float:
        assert self.config.budget_s is not None, "the budget is left to a device: KernelPyTorchConfig.on()"
        return self.config.budget_s

    def _time_left(self) -> float:
        return self._budget_s - (time.monotonic() - self.started)

    def _reserve(self) -> float:
        """Return the seconds to keep: for the next trial and the confirmation, each what a trial has taken so far."""
        best = finalists(self.evidence, self.config.min_gain, most=1)
        confirmation = _warm_seconds(best[0]) if best else 0.0
        return confirmation + _CONFIRM_SHARE * self._budget_s + max(t.seconds for t in self.evidence) / 2

    def _try(self, candidate: Candidate, phase: str, pairs: int = 0, seconds: float = 0.0) -> Trial:
        request = TrialRequest(
            candidate,
            phase=phase,
            seconds=seconds or _SCREEN_SHARE * self._budget_s,
            pairs=pairs,
            seed=self.config.seed + (_SEED_OF_CONFIRMATION if phase == "confirm" else 0),
            memo_dir=self.jobs.memo_dir,
            artifact_dir=self.artifact_dir if phase == "confirm" else "",
        )
        deadline = self.config.trial_timeout_s
        if phase == "screen":
            deadline = min(deadline, max(self._time_left(), 10.0), self._patience(candidate))
        self._tell("trial_started", f"{phase} {candidate.label}", candidate=candidate)
        trial = self.jobs.run(request, timeout_s=deadline)
        self.evidence.append(trial)
        self.journal(trial)
        self._tell("trial_finished", candidate.label, trial=trial, candidate=candidate)
        return trial

    def _patience(self, candidate: Candidate) -> float:
        """Return the seconds that a candidate without compilation may take: several times the unmodified model's."""
        plain = next((t.seconds for t in self.evidence if not t.candidate.steps and t.phase == "screen"), None)
        if plain is None or any(self.proposals.transform_of(s).compiles for s in candidate.steps):
            return float("inf")
        return 10.0 + 3.0 * plain

    def _confirm(self) -> Trial:
        """Return the first finalist that fresh samples confirm, else the unmodified model.

        The first is confirmed whatever the clock says, the next ones only where a quarter of the budget over it is
        not yet spent.
        """
        for i, finalist in enumerate(finalists(self.evidence, self.config.min_gain)):
            if i and self._time_left() < -0.25 * self._budget_s:
                break
            done = [t for t in self.evidence if t.phase == "confirm" and t.candidate == finalist.candidate]
            trial = done[0] if done else self._try(finalist.candidate, "confirm", *self._confirmation(finalist))
            if is_confirmed(trial, self.config.min_gain):
                return trial
        if self.artifact_dir:
            discard(Path(self.artifact_dir))  # of a choice that was not confirmed
        kept = next(t for t in self.evidence if not t.candidate.steps)
        return replace(kept, reason="nothing faster was right and confirmed: the unmodified model is kept")

    def _explained(self, trial: Trial, chosen: Candidate, strategy: Strategy) -> Trial:
        if trial.status is not Status.OK:
            return trial
        screened = strategy.trials.get(chosen)
        ratio = screened.measurement.ratio if screened is not None and screened.measurement is not None else None
        return replace(trial, reason=why_not(trial, chosen, self.config.min_gain, ratio))

    def _tell(self, kind: str, message: str, *, trial: Trial | None = None, candidate: Candidate | None = None) -> None:
        elapsed = time.monotonic() - self.started
        self.listen(
            Event(
                kind,
                message,
                trial=trial,
                candidate=candidate,
                elapsed_s=elapsed,
                budget_s=self._budget_s,
            )
        )

    def _confirmation(self, finalist: Trial) -> tuple[int, float]:
        """Return how many fresh pairs confirm what the screening saw, and the seconds they may take."""
        m = finalist.measurement
        assert m is not None
        pairs = confirm_pairs(m.ratio, len(m.samples_ms))
        needed = 3.0 * pairs * (m.median_ms + m.baseline_median_ms) / 1e3
        return pairs, min(max(needed, _CONFIRM_SHARE * self._budget_s), 5.0 + 0.25 * self._budget_s)


def _warm_seconds(trial: Trial) -> float:
    """Return what a trial would take again: most of its compilation is in the compiler's cache (2.7 s of 22 seen)."""
    compiled = trial.measurement.compile_seconds if trial.measurement is not None else 0.0
    return max(trial.seconds - _CACHED * compiled, 0.0)
