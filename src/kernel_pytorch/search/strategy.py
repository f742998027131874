"""Which candidate to try next: cheap single steps first, then compilation on top of what won, then the rest.

Compilation is dear and timing is cheap, so the most promising step of each group that needs no compiler is tried alone
first. Then the first compile steps are tried on the best of those, with the steps that pay inside compiled code only
and without those that do by hand what compilation does, and after each all winners together on the best so far; then
one by one; then the other cheap steps, all compile steps on the best, the remaining winners added to the best candidate
so far, and runners-up. A candidate whose upper bound cannot reach the smallest gain, that contains a step that was
wrong alone, or that has been tried, is not tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from kernel_pytorch.core.types import Candidate, Status, Step, Trial, Untried
from kernel_pytorch.measure.stats import cautious
from kernel_pytorch.search.propose import Proposals

__all__ = ["Strategy"]

_LOOKS_FASTER = 1.005
"""Measured speed-up from which a step is tried among all others that looked faster."""


class Strategy:
    """Proposes candidates one at a time and learns from finished trials.

    Args:
        proposals: What could be done.
        ceilings: Upper bound of the speed-up by candidate label; absent is unbounded.
        min_gain: As in the configuration.
    """

    def __init__(self, proposals: Proposals, ceilings: Mapping[str, float], min_gain: float) -> None:
        self.proposals = proposals
        self.ceilings = ceilings
        self.min_gain = min_gain
        self.trials: dict[Candidate, Trial] = {}
        self.pruned: dict[Candidate, str] = {}

    def record(self, trial: Trial) -> None:
        """Take a finished trial into account."""
        self.trials[trial.candidate] = trial

    def next(self) -> Candidate | None:
        """Return the next candidate worth trying, or `None`."""
        for candidate in self._ordered():
            if candidate in self.trials or candidate in self.pruned or not candidate.steps:
                continue
            why = self._hopeless(candidate)
            if why:
                self.pruned[candidate] = why
                continue
            return candidate
        return None

    def untried(self, reason: str) -> tuple[Untried, ...]:
        """Return what was not tried: pruned candidates with their reason, the others with `reason`."""
        rest: dict[Candidate, str] = dict(self.pruned)
        for candidate in self._ordered():
            if candidate.steps and candidate not in self.trials:
                rest.setdefault(candidate, self._hopeless(candidate) or reason)
        return tuple(Untried(c, why) for c, why in rest.items())

    def gain(self, candidate: Candidate) -> float:
        """Return how fast a candidate is for certain; 1.0 for the unmodified model, 0.0 where it is not `ok`."""
        if not candidate.steps:
            return 1.0
        trial = self.trials.get(candidate)
        if trial is None or trial.status is not Status.OK or trial.measurement is None:
            return 0.0
        return cautious(trial.measurement.ratio)

    def _ceiling(self, candidate: Candidate) -> float:
        """Return an upper bound: the shares of the time that the steps can save add up at most."""
        saved = sum(1.0 - 1.0 / self.ceilings.get(str(step), float("inf")) for step in candidate.steps)
        together = 1.0 / (1.0 - saved) if saved < 1.0 else float("inf")
        return min(together, self.ceilings.get(candidate.label, float("inf")))

    def _hopeless(self, candidate: Candidate) -> str:
        for step in candidate.steps:
            trial = self.trials.get(Candidate((step,)))
            if len(candidate.steps) > 1 and trial is not None and trial.status is not Status.OK:
                return f"{step} alone was {trial.status}"
        ceiling = self._ceiling(candidate)
        if ceiling < 1.0 + self.min_gain:
            return f"predicted to gain at most {max(ceiling, 1.0):.3g}x"
        return ""

    def _ordered(self) -> Iterator[Candidate]:
        along = {t.name for t, _ in self.proposals.steps if getattr(t, "pays_compiled", False)}
        cheap = [s for t, steps in self.proposals.steps if not t.compiles and t.name not in along for s in steps]
        inside = [steps[0] for t, steps in self.proposals.steps if t.name in along]
        dear = [s for t, steps in self.proposals.steps if t.compiles for s in steps]
        cheap.sort(key=lambda s: -self._ceiling(Candidate((s,))))
        leaders: dict[str, Step] = {}
        for step in cheap:
            leaders.setdefault(self.proposals.transform_of(step).group, step)
        yield from (Candidate((s,)) for s in leaders.values())
        fused = {t.name for t, _ in self.proposals.steps if getattr(t, "compile_fuses", False)}
        kept = [s for s in cheap if s.transform not in fused]
        plain = [c for c in self.trials if all(s in kept for s in c.steps)]
        compiled = [c for c in self.trials if all(s in [*kept, *dear, *inside] for s in c.steps)]
        for step in dear[:2]:
            yield from self._extensions(self._best(plain), [step], along=inside)
            yield from self._all_winners(self._best(compiled), kept)
        plain = compiled
        yield from self._extensions(self._best(plain), [s for s in kept if self.gain(Candidate((s,))) > 1.0])
        yield from self._extensions(self._best(plain), dear[:1], along=inside)
        yield from (Candidate((s,)) for s in (*cheap, *inside))
        yield from self._extensions(self._best(plain), dear, along=inside)
        yield from self._extensions(self._best(self.trials), [s for s in cheap if self.gain(Candidate((s,))) > 1.0])
        yield from self._extensions(self._best(self.trials), [*cheap, *dear], replace=True)
        yield from (Candidate((s,)) for s in dear)

    def _all_winners(self, base: Candidate, steps: list[Step]) -> Iterator[Candidate]:
        """Yield `base` with every step at once that looked faster alone, the best of each group.

        One compilation for all; and steps whose gain of one or two per cent is within the noise alone add up.
        """
        taken = {self.proposals.transform_of(s).group for s in base.steps}
        best: dict[str, Step] = {}
        for step in sorted(steps, key=lambda s: -self._looks(s)):
            group = self.proposals.transform_of(step).group
            if group not in taken and self._looks(step) > _LOOKS_FASTER:
                best.setdefault(group, step)
        if len(best) > 1:
            yield self.proposals.combine([*base.steps, *best.values()])

    def _looks(self, step: Step) -> float:
        """Return the speed-up that a step alone was measured to have, however uncertain; 0.0 where it is not `ok`."""
        trial = self.trials.get(Candidate((step,)))
        measured = trial.measurement if trial is not None and trial.status is Status.OK else None
        return 0.0 if measured is None else measured.ratio.value

    def _best(self, candidates: Iterable[Candidate]) -> Candidate:
        best = max(candidates, key=self.gain, default=Candidate())
        return best if self.gain(best) > 1.0 else Candidate()

    def _extensions(
        self, base: Candidate, steps: list[Step], *, along: list[Step] | None = None, replace: bool = False
    ) -> Iterator[Candidate]:
        """Yield `base` with each step added, or put in the place of the step of its group.

        Steps `along` come with it, unless they were seen to spoil a candidate: then it is tried without them.
        """
        groups = {self.proposals.transform_of(s).group: s for s in base.steps}
        for step in steps:
            group = self.proposals.transform_of(step).group
            if step in base.steps or (group in groups and not replace):
                continue
            kept = [s for s in base.steps if s is not groups.get(group)]
            without = self.proposals.combine([*kept, step])
            if along and not self._spoil(along):
                with_them = self.proposals.combine([*kept, *along, step])
                yield with_them
                if self._status(with_them) in (None, Status.OK):
                    continue
            yield without

    def _status(self, candidate: Candidate) -> Status | None:
        trial = self.trials.get(candidate)
        return None if trial is None else trial.status

    def _spoil(self, steps: list[Step]) -> bool:
        """Return whether a candidate was fine without these steps and not with them."""
        fine = [c for c, t in self.trials.items() if t.status is Status.OK and c.steps]
        return any(self._status(self.proposals.combine([*c.steps, *steps])) not in (None, Status.OK) for c in fine)
