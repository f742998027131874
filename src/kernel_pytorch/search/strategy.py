"""Which candidate to try next: cheap single steps first, then compilation on top of what won, then the rest.

Compilation is dear and timing is cheap, so the most promising step of each group that needs no compiler is tried
alone first; where it was wrong or failed, the next of its group at once; where it needs another step's help, with
that. Then the first compile step is tried on the best of those, with the steps that pay inside compiled code only and
without those that do by hand what compilation does, then all winners together; then the second compile step in the
place of the first. Steps that are rejected more often than not (`tries_late`) wait until then. Then winners one by
one; the other cheap steps, all compile steps on the best, the remaining winners added to the best candidate so far,
and runners-up. A candidate whose upper bound cannot reach the smallest gain, that contains a step that was wrong
alone, or that has been tried, is not tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from kernel_pytorch.core.types import Candidate, Status, Step, Trial, Untried
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.measure.stats import cautious
from kernel_pytorch.search.propose import Proposals

__all__ = ["Strategy"]

_LOOKS_FASTER = 1.005
"""Measured speed-up from which a step is tried among all others that looked faster."""
_NOT_SLOWER = 0.99
"""The same of a step whose gain alone is within the noise, but adds to others (`pays_in_sum`)."""
_STAND_INS = 2
"""How many steps of a group are tried early in the place of one that was wrong or failed."""


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
        for step in candidate.steps if len(candidate.steps) > 1 else ():
            if self._is_bad(step) and candidate not in self._forms(step):
                return f"{step} alone was {self._status(Candidate((step,)))}"
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
        late = {t.name for t, _ in self.proposals.steps if getattr(t, "tries_late", False)}
        yield from self._leaders([s for s in cheap if s.transform not in late])
        fused = {t.name for t, _ in self.proposals.steps if getattr(t, "compile_fuses", False)}
        kept = [s for s in cheap if s.transform not in fused]
        plain = [c for c in self.trials if all(s in kept for s in c.steps)]
        compiled = [c for c in self.trials if all(s in [*kept, *dear, *inside] for s in c.steps)]
        for i, step in enumerate(dear[:2]):
            best = self._best(compiled)
            if i and dear[0] in best.steps:
                swapped = list(self._extensions(best, [step], along=inside, replace=True))
                yield from swapped
                if all(self._status(c) in (None, Status.OK) for c in swapped):
                    continue
            yield from self._extensions(self._best(plain), [step], along=inside)
            together = list(self._all_winners(self._best(compiled), kept))
            yield from together
            if any(self._status(c) is Status.FAILED for c in together):
                # A winner that cannot be compiled may be worth more with the others than compilation is.
                yield from self._all_winners(self._best(plain), kept)
        yield from self._leaders([s for s in cheap if s.transform in late])
        plain = compiled
        yield from self._extensions(self._best(plain), [s for s in kept if self._gains(s)])
        yield from self._extensions(self._best(plain), dear[:1], along=inside)
        yield from (Candidate((s,)) for s in (*cheap, *inside))
        yield from self._extensions(self._best(plain), dear, along=inside)
        yield from self._extensions(self._best(self.trials), [s for s in cheap if self._gains(s)])
        yield from self._extensions(self._best(self.trials), [*cheap, *dear], replace=True)
        yield from (Candidate((s,)) for s in dear)

    def _forms(self, step: Step) -> list[Candidate]:
        """Return the candidates that show a step: itself alone, and with the steps that make it possible."""
        names = getattr(self.proposals.transform_of(step), "enabled_by", ())
        helpers = [steps[0] for t, steps in self.proposals.steps if t.name in names]
        alone = [Candidate((step,))]
        return [*alone, self.proposals.combine([*helpers, step])] if helpers else alone

    def _is_bad(self, step: Step) -> bool:
        """Return whether no form of a step is right, those not yet tried counted as right."""
        return all(self._status(form) not in (None, Status.OK) for form in self._forms(step))

    def _gains(self, step: Step) -> bool:
        return any(self.gain(form) > 1.0 for form in self._forms(step))

    def _leaders(self, steps: list[Step]) -> Iterator[Candidate]:
        """Yield the most promising step of each group; see `_leader`."""
        groups: dict[str, list[Step]] = {}
        for step in steps:
            groups.setdefault(self.proposals.transform_of(step).group, []).append(step)
        for group in groups.values():
            yield from self._leader(group[: 1 + _STAND_INS])

    def _leader(self, steps: list[Step]) -> Iterator[Candidate]:
        """Yield the first step of a group, its other form where it is bad alone, and the next one where both are.

        Where a transform does not apply at all, its other steps do not either.
        """
        refused: set[str] = set()
        for step in steps:
            if step.transform in refused:
                continue
            for form in self._forms(step):
                yield form
                if self._status(form) in (None, Status.OK):
                    return
                if self.trials[form].reason.startswith(CandidateError.__name__):
                    refused.add(step.transform)

    def _all_winners(self, base: Candidate, steps: list[Step]) -> Iterator[Candidate]:
        """Yield `base` with every step at once that looked faster alone, the best of each group.

        One compilation for all; and steps whose gain of one or two per cent is within the noise alone add up.
        """
        taken = {self.proposals.transform_of(s).group for s in base.steps}
        best: dict[str, Step] = {}
        for step in sorted(steps, key=lambda s: -self._looks(s)):
            transform = self.proposals.transform_of(step)
            least = _NOT_SLOWER if getattr(transform, "pays_in_sum", False) else _LOOKS_FASTER
            if transform.group not in taken and self._looks(step) > least:
                best.setdefault(transform.group, step)
        if best:
            yield self.proposals.combine([*base.steps, *best.values()])

    def _looks(self, step: Step) -> float:
        """Return the speed-up that a step was measured to have, however uncertain; 0.0 where it is not `ok`."""
        right = [t for t in map(self.trials.get, self._forms(step)) if t is not None and t.status is Status.OK]
        return max((t.measurement.ratio.value for t in right if t.measurement is not None), default=0.0)

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
            held = {self.proposals.transform_of(s).group for s in kept}
            more = [s for s in along or () if self.proposals.transform_of(s).group not in held]
            if more and not self._spoil(more):
                with_them = self.proposals.combine([*kept, *more, step])
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
