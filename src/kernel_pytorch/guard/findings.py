"""What a check has found, in words: the verdict, its reason, what is left of the speed-up, what may be to blame."""

from __future__ import annotations

import datetime as dt
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace

from kernel_pytorch.core.types import DeviceSpec, Measurement, Plan, Ratio, Status, Trial, Verdict
from kernel_pytorch.guard.culprit import find_culprits
from kernel_pytorch.guard.plan_trial import Seen
from kernel_pytorch.guard.stale import same_code, software_of, told_only
from kernel_pytorch.guard.types import Comparison, Culprit, SideFacts
from kernel_pytorch.measure.stats import paired_ratio
from kernel_pytorch.validation.regression import Judgement

__all__ = ["Findings", "Samples", "planned"]

_GREW = 0.05
_LAYER_SLOWER = 1.1

Samples = tuple[tuple[float, ...], tuple[float, ...]]
"""Of the unmodified model and of the plan, in pairs."""


def planned(plan: Plan) -> Ratio:
    """Return the speed-up that a plan found, with its interval; 1 where nothing was measured."""
    measured = plan.chosen.measurement
    return measured.ratio if measured is not None else Ratio(1.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Findings:
    """Puts what a check has seen into words.

    Attributes:
        plan: The plan.
        device: This machine's.
        max_slowdown: The smallest slowdown that matters.
        keep: Share of the planned speed-up that had to be left.
        name: What is checked.
        command: What reproduces it.
        began: When the check began, on `time.monotonic`'s clock.
    """

    plan: Plan
    device: DeviceSpec
    max_slowdown: float
    keep: float
    name: str
    command: str
    began: float

    def stale(self, changed: tuple[str, ...], again: str) -> Comparison:
        """Return the comparison of a plan that is of other software or another device; `again` re-validates it."""
        if same_code(self.plan, self.device):
            how = f"to validate it here and stamp it anew: {again}" if again else "validate it here with refresh=True"
        else:
            how = f"it cannot be applied here; make one: {self._optimize()}"
        reason = f"the plan was made with something else than what is here: {'; '.join(changed)}; {how}"
        found = self._make(Verdict.STALE, reason, base=self._planned_side(), head=self._side("here"))
        return replace(found, culprits=find_culprits(found))

    def undecided(self, why: str, samples: Samples) -> Comparison:
        """Return the comparison of a check that ended early, with what was sampled until then."""
        base, head = samples
        change = paired_ratio(head, base) if head else None
        notes = (f"{len(head)} pairs were sampled before",) if head else ()
        return self._make(Verdict.INCONCLUSIVE, why, samples=samples, change=change, notes=notes)

    def judged(self, seen: Seen, samples: Samples, owed: float) -> Comparison:
        """Return the comparison of a plan that was tried.

        Args:
            seen: What the trial has told.
            samples: What it has sampled.
            owed: Speed-up that the plan had to show.
        """
        trial = seen.trial
        notes = (*told_only(self.plan, self.device), *_unchecked(trial))
        if trial.status is Status.WRONG:
            found = self._make(Verdict.WRONG, _wrong(trial), notes=notes)
            return replace(found, culprits=find_culprits(replace(found, base=self._planned_side())))
        if trial.status is Status.FAILED:
            return self._make(Verdict.FAIL, f"the plan no longer runs: {trial.reason}", notes=notes)
        if trial.status is not Status.OK or seen.judgement is None:
            return self._make(Verdict.INCONCLUSIVE, f"{trial.status}: {trial.reason}", notes=notes)
        judged, told = seen.judgement, trial.measurement
        change = _scaled(judged.change, 1.0 / owed)
        sides = [self._side(label, seen.telemetry) for label in ("unmodified", "plan")]
        if told is not None:
            sides = [
                replace(s, peak_bytes=b)
                for s, b in zip(sides, (told.baseline_peak_bytes, told.peak_bytes), strict=True)
            ]
        notes = (self._kept(change), *self._memory(told), *judged.notes, *notes)
        found = self._make(
            judged.verdict,
            self._reason(judged, change, owed, seen.confirmed),
            base=sides[0],
            head=sides[1],
            samples=samples,
            change=change,
            notes=tuple(n for n in notes if n),
        )
        failed = judged.verdict is Verdict.FAIL
        return replace(found, culprits=self._culprits(seen, found, owed)) if failed else found

    def _reason(self, judged: Judgement, change: Ratio, owed: float, confirmed: str) -> str:
        now, plan = _inverse(change), planned(self.plan)
        again = f"; confirmed by {confirmed}" if confirmed else ""
        seen = f"{now.value:.2f}x ({now.low:.2f} to {now.high:.2f}) of the unmodified model's speed"
        if judged.verdict is Verdict.FAIL and change.low > 1.0:
            return f"the plan is slower than the unmodified model: {seen}{again}"
        if judged.verdict is Verdict.FAIL:
            kept = f"{100.0 * self.keep:.0f} % had to be kept"
            return f"the planned speed-up is lost: {plan.value:.2f}x was planned, now {seen}; {kept}{again}"
        if judged.verdict is Verdict.PASS:
            return f"right, and {seen}" + (f", {plan.value:.2f}x was planned" if self.plan.candidate.steps else "")
        if judged.change.low > 1.0:
            return f"right, and slower in one process ({seen}), {judged.reason}"
        planned_for = f"{owed:.2f}x, {100.0 * self.keep:.0f} % of what was planned"
        need = planned_for if owed > 1.0 else "as fast as the unmodified model"
        return f"right, and {seen}: {judged.pairs} pairs do not decide whether it is {need}"

    def _kept(self, change: Ratio) -> str:
        plan = planned(self.plan)
        if not self.plan.candidate.steps or self.plan.chosen.measurement is None:
            return ""
        share = _inverse(change).value / plan.value
        interval = f"{plan.value:.2f}x ({plan.low:.2f} to {plan.high:.2f})"
        return f"{100.0 * share:.0f} % of the planned speed-up of {interval} is left"

    def _memory(self, told: Measurement | None) -> tuple[str, ...]:
        made = self.plan.chosen.measurement
        if told is None or told.peak_bytes is None:
            return ()
        lines = []
        for what, before in (
            ("than when it was planned", made.peak_bytes if made is not None else None),
            ("than the unmodified model's", told.baseline_peak_bytes),
        ):
            if before and told.peak_bytes > (1.0 + _GREW) * before:
                now, old = (f"{size / 2**20:.1f} MiB" for size in (told.peak_bytes, before))
                lines.append(
                    f"peak memory is {now}, {100.0 * (told.peak_bytes / before - 1.0):.0f} % more {what} ({old})"
                )
        return tuple(lines)

    def _culprits(self, seen: Seen, found: Comparison, owed: float) -> tuple[Culprit, ...]:
        """Return what differs from when the plan was made: layers that got slower, new notes, clocks, load, memory."""
        made, layers = self.plan.chosen, []
        for layer, (before, after) in seen.layers_ms.items():
            if layer in made.layers_ms:
                old_before, old_after = made.layers_ms[layer]
                was, now = old_before / old_after, before / after
                if was > _LAYER_SLOWER * now:
                    what = f"{layer} was {was:.2f}x as fast as unmodified when it was planned, is {now:.2f}x now"
                    evidence = {"planned_ms": old_after, "now_ms": after, "unmodified_ms": before}
                    layers.append(((was - now) * after, Culprit("kernels", what, evidence=evidence)))
        ranked = [culprit for _, culprit in sorted(layers, key=lambda one: -one[0])]
        fresh = [note for note in seen.trial.notes if note not in made.notes]
        told = made.measurement
        since = replace(
            found,
            base=replace(
                self._planned_side(),
                telemetry=told.telemetry if told is not None else {},
                peak_bytes=told.peak_bytes if told is not None else None,
            ),
            base_samples_ms=tuple(ms / owed for ms in found.base_samples_ms),
            change=None if found.change is None else _scaled(found.change, owed),
        )
        known = tuple(culprit for culprit in find_culprits(since) if culprit.kind != "unknown")
        notes = tuple(Culprit("recompilation", f"new since it was planned: {note}") for note in fresh)
        return (*ranked, *known, *notes)

    def _planned_side(self) -> SideFacts:
        made = self.plan.device
        software = software_of(made, self.plan.package_version)
        return SideFacts("planned", software=software, device_key=made.key, fingerprint=self._model)

    @property
    def _model(self) -> str:
        return self.plan.workload.fingerprint

    def _optimize(self) -> str:
        return self.plan.command or "kpt optimize TARGET"

    def _side(self, label: str, telemetry: Mapping[str, float] | None = None) -> SideFacts:
        return SideFacts(
            label,
            python=sys.executable,
            software=software_of(self.device),
            device_key=self.device.key,
            fingerprint=self._model,
            telemetry=dict(telemetry or {}),
        )

    def _make(
        self,
        verdict: Verdict,
        reason: str,
        *,
        base: SideFacts | None = None,
        head: SideFacts | None = None,
        samples: Samples = ((), ()),
        change: Ratio | None = None,
        notes: tuple[str, ...] = (),
    ) -> Comparison:
        return Comparison(
            kind="check",
            name=self.name,
            verdict=verdict,
            reason=reason,
            max_slowdown=self.max_slowdown,
            base=base or self._side("unmodified"),
            head=head or self._side("plan"),
            created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            id=uuid.uuid4().hex,
            change=change,
            base_samples_ms=samples[0],
            head_samples_ms=samples[1],
            notes=notes,
            command=self.command,
            seconds=time.monotonic() - self.began,
        )


def _scaled(ratio: Ratio, by: float) -> Ratio:
    return Ratio(ratio.value * by, ratio.low * by, ratio.high * by, ratio.confidence)


def _inverse(ratio: Ratio) -> Ratio:
    low, high = (1.0 / x if x > 0.0 else float("inf") for x in (ratio.high, ratio.low))
    return Ratio(1.0 / ratio.value, low, high, ratio.confidence)


def _wrong(trial: Trial) -> str:
    report = trial.numerics
    where = f"; first parts at {report.diverged_at}" if report is not None and report.diverged_at else ""
    return f"the plan computes something else: {trial.reason}{where}"


def _unchecked(trial: Trial) -> tuple[str, ...]:
    return tuple(f"not checked: {line}" for line in trial.numerics.unchecked) if trial.numerics is not None else ()
