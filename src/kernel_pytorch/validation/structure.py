"""Gate 2: structural steps in fp64, at perturbed parameters and buffers, on varied inputs; near-exact.

Steps that do not compile are judged under lifted hard-coded casts, so 1e-9 is the budget whatever the model casts
inside; steps that cast to bfloat16 or float16 too, for lifted their casts do nothing. A compiled call cannot run under
a dispatch mode: it is judged in fp64 without lifting, at the workload's own shapes, against a budget widened by what
the hard-coded casts cost the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from kernel_pytorch import catalog
from kernel_pytorch.core.program import clone_call, clone_model
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import Candidate, Check, Gate, Mode, Step
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.validation.compare import compare_values, flatten, structure_checks, tensor_error
from kernel_pytorch.validation.gradients import Gradients, gradient_checks, gradients_of
from kernel_pytorch.validation.lift import QuantisationWatch, lift_tree, lifted, lifted_model
from kernel_pytorch.validation.locate import first_difference
from kernel_pytorch.validation.oracle import Oracle, digest_of, loss_of
from kernel_pytorch.validation.subject import Observed, Subject, attempt, observe, routed, run
from kernel_pytorch.validation.vary import batch_size, perturb, resized, rows_of, variations, zero_dropout

__all__ = ["Verdict", "structure"]

NEAR_EXACT = 1e-9
"""fp64 rounding (1e-16) of some 1e3 operators in a row, each with a condition of up to 1e4."""
_FP32 = 1e-4
"""The same where only fp32 runs; where the reference runs in fp64, 20 times its own rounding, at least the next."""
_FP32_LEAST = 1e-6
_GRADIENTS = 100.0
"""Times what outputs may differ by: a backward pass adds terms that cancel."""
_GRADIENT_FLOOR = 1e-8
_HARD_CASTS = 20.0
_COMPILED_ROWS = 4
_UNLIFTED = "{}: its structure at high precision, for it does not run there"


@dataclass(slots=True)
class Verdict:
    """What one gate found; kept in the memo, for many candidates share their structural steps."""

    checks: list[Check] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    diverged_at: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        plain = [(c.name, str(c.gate), c.error, c.budget, c.detail, c.case) for c in self.checks]
        return {"checks": plain, "unchecked": self.unchecked, "diverged_at": self.diverged_at}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Verdict:
        """Return what `as_dict` gave."""
        checks = [Check(c[0], Gate(c[1]), *c[2:]) for c in plain["checks"]]
        return cls(checks, list(plain["unchecked"]), plain["diverged_at"])

    def add(self, other: Verdict) -> None:
        """Take over another verdict."""
        self.checks += other.checks
        self.unchecked += other.unchecked
        self.diverged_at = self.diverged_at or other.diverged_at


def compiles(step: Step) -> bool:
    """Return whether a step generates code; a step the catalog does not know does not."""
    try:
        return catalog.find(step.transform).compiles
    except CandidateError:
        return False


def structure(subject: Subject, oracle: Oracle, level: str) -> Verdict:
    """Judge the structural steps of a candidate: those that do not compile, and with them those that do."""
    steps = tuple(s for s in subject.candidate.steps if subject.structural(s))
    plain = Candidate(tuple(s for s in steps if not compiles(s)))
    casting = Candidate(tuple(s for s in subject.candidate.steps if not compiles(s)))
    verdict = Verdict()
    lossy = subject.workload.evaluate is not None or any(_quantises(s) for s in casting.steps)
    if len(casting.steps) > len(plain.steps) and not lossy:
        verdict.add(_memoised(subject, oracle, casting, level, compiled=False, casting=True))
    if plain.steps and not verdict.checks:
        verdict.add(_memoised(subject, oracle, plain, level, compiled=False))
    if len(steps) > len(plain.steps) and all(c.passed for c in verdict.checks):
        verdict.add(_memoised(subject, oracle, Candidate(steps), level, compiled=True))
    return verdict


def _quantises(step: Step) -> bool:
    return any(word in step.transform for word in ("quant", "int8", "int4", "fp8", "float8"))


def _with_casts_lifted(trial: _Trial) -> Verdict:
    """Judge steps that cast to bfloat16 or float16: lifted, their casts do nothing, and what is left must be exact.

    Says nothing (no checks) of steps that turn out to round to integers or 8 bits, or do not run in fp64.
    """
    with QuantisationWatch() as watch:  # type: ignore[no-untyped-call]
        verdict = trial.run()
    failed = [c for c in verdict.checks if not c.passed]
    if not failed or not (watch.seen or any(c.name in ("applies", "runs") for c in failed)):
        return verdict
    return Verdict(unchecked=[_UNLIFTED.format(trial.part.label)])


def _memoised(
    subject: Subject, oracle: Oracle, part: Candidate, level: str, *, compiled: bool, casting: bool = False
) -> Verdict:
    trial = _Trial(subject, oracle, part, level, compiled=compiled, casting=casting)
    judged: Callable[[], Verdict] = (lambda: _with_casts_lifted(trial)) if casting else trial.run
    key = f"structure {oracle.identity} {subject.config.seed} {level} {part.label}"
    return Verdict.from_dict(oracle.memo.get(key, lambda: judged().as_dict()))


@dataclass(frozen=True, slots=True)
class _Named:
    """A call on which both are run."""

    name: str
    call: Call
    seed: int


@dataclass(slots=True)
class _Want:
    """What the perturbed reference does on the calls it accepts.

    Attributes:
        accepted: Indices of the calls it accepts, at its own precision and at this one.
        precision: `lifted`, `fp64` (hard-coded casts stay) or `fp32`.
        budgets: Allowed error of each accepted call.
        gradient_budget: Allowed error of a gradient.
        why: Why it is not fp64.
    """

    accepted: list[int]
    precision: str
    seen: Observed
    budgets: list[float]
    gradients: Gradients | None
    gradient_budget: float
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "accepted": self.accepted,
            "precision": self.precision,
            "seen": self.seen.as_dict(),
            "budgets": self.budgets,
            "gradient_budget": self.gradient_budget,
            "why": self.why,
            "gradients": None if self.gradients is None else self.gradients.as_dict(),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> _Want:
        """Return what `as_dict` gave."""
        grads = plain["gradients"]
        return cls(
            **{**plain, "seen": Observed.from_dict(plain["seen"]),
               "gradients": None if grads is None else Gradients(**grads)}
        )  # fmt: skip


def _at(tree: Any, precision: str) -> Any:
    if isinstance(tree, Call):
        args, kwargs = _at((tree.args, dict(tree.kwargs)), precision)
        return Call(args, kwargs)
    return tree if precision == "fp32" else lift_tree(tree)


def _precise(precision: str, *, compiled: bool) -> ExitStack:
    stack = ExitStack()
    if precision != "fp32":
        stack.enter_context(lifted(hard_casts=precision == "lifted"))
    if compiled:
        import torch._inductor.config as inductor

        stack.enter_context(inductor.patch(fallback_random=True))
    return stack


class _Trial:
    """One structural sub-candidate against the perturbed reference."""

    def __init__(
        self, subject: Subject, oracle: Oracle, part: Candidate, level: str, *, compiled: bool, casting: bool
    ) -> None:
        self.subject, self.oracle, self.part, self.level, self.compiled = subject, oracle, part, level, compiled
        self.casting = casting
        self.mode, self.seed = subject.config.mode, subject.config.seed
        self.verdict = Verdict()
        self.fp32 = ""
        self._perturbed: nn.Module | None = None

    def run(self) -> Verdict:
        """Return the verdict of the sub-candidate."""
        built, refused = self._first_build()
        dynamic = not self.compiled and (built is None or bool(built.dynamic))
        if not dynamic:
            self.verdict.unchecked.append(f"{self.part.label}: other input shapes, for it is made for its own")
        calls = self._varied() if dynamic else self._own()
        want = self._want(calls, small=dynamic)
        if want is None:
            return self.verdict
        if self.casting and want.precision == "fp32":  # where casts are not lifted, and cost what they cost
            return Verdict(unchecked=[_UNLIFTED.format(self.part.label)])
        for i in sorted(set(range(len(calls))) - set(want.accepted)):
            self.verdict.unchecked.append(f"inputs {calls[i].name!r}: the unmodified model does not take them")
        accepted = [calls[i] for i in want.accepted]
        error = refused
        if want.precision != ("fp32" if self.fp32 else "lifted"):
            built, error = attempt(lambda: self._build(self.part, want.precision))
        if built is None:
            self._fail("applies", f"the structural steps do not apply at high precision: {error}")
            return self.verdict
        if want.why:
            self.verdict.unchecked.append(want.why)
        gradients = None
        with _precise(want.precision, compiled=self.compiled):
            model = routed(built)
            sequence = [(_at(c.call, want.precision), c.seed) for c in [*accepted, accepted[0]]]
            seen = observe(model, sequence, self.mode)
            if want.gradients is not None and not seen.error:
                loss = built.step_loss(loss_of(self.subject.workload))
                batch = _at(self._batch(small=dynamic), want.precision)
                gradients = gradients_of(model, loss, batch, self.seed)
        self._compare(want, seen, gradients, accepted)
        if not all(c.passed for c in self.verdict.checks):
            self._locate(want, accepted)
        return self.verdict

    def _first_build(self) -> tuple[Program | None, str]:
        """Apply steps that do not compile in fp64, or in fp32 where they refuse fp64 and only that."""
        if self.compiled:
            return None, ""
        built, error = attempt(lambda: self._build(self.part, "lifted"))
        if error.startswith(CandidateError.__name__):
            narrow, _ = attempt(lambda: self._build(self.part, "fp32"))
            if narrow is not None:
                self.fp32 = error
                return narrow, ""
        return built, error

    def _own(self) -> list[_Named]:
        count = {"quick": 1, "standard": 1, "strict": 2}[self.level]
        return [
            _Named(f"{case}, own length {i}", self._few(self.oracle.call(case, i)), self.seed + i)
            for case in self.subject.workload.cases
            for i in range(count)
        ]

    def _few(self, call: Call) -> Call:
        """Return a few samples of a call where the unmodified model takes them: fp64 is dear."""
        size = batch_size(call)
        few = rows_of(call, list(range(_COMPILED_ROWS))) if size > _COMPILED_ROWS else call
        return few if few is call or self._accepts(_Named("", few, self.seed)) else call

    def _varied(self) -> list[_Named]:
        calls = []
        for k, case in enumerate(self.subject.workload.cases):
            named = variations("quick" if k else self.level, self.seed, self.oracle.call(case, 0))
            calls += [_Named(f"{case}, {name}", call, self.seed + i) for i, (name, call) in enumerate(named)]
        return calls

    def _batch(self, *, small: bool) -> Any:
        batch = self.oracle.batch(next(iter(self.subject.workload.cases)), 0)
        return resized(Call((batch,)), batch=2).args[0] if small else batch

    def _base(self, precision: str) -> nn.Module:
        """Return a perturbed copy; outside of lifting, which would round the perturbation differently."""
        if self._perturbed is None:
            self._perturbed = clone_model(self.subject.reference)
            zero_dropout(self._perturbed)
            perturb(self._perturbed, self.seed + 17)
        model = clone_model(self._perturbed)
        return model if precision == "fp32" else lifted_model(model)

    def _build(self, part: Candidate, precision: str) -> Program:
        cases = self.subject.workload.cases
        few: Callable[[Call], Call] = self._few if self.compiled else lambda call: call
        calls = {case: _at(few(self.oracle.call(case, 0)), precision) for case in cases}
        model = self._base(precision)
        with _precise(precision, compiled=self.compiled):
            return self.subject.build(model, part, calls)

    def _want(self, calls: list[_Named], *, small: bool) -> _Want | None:
        key = (
            f"want {self.oracle.identity} {self.seed} {self.compiled} {small} {bool(self.fp32)} "
            f"{[(c.name, digest_of(c.call), c.seed) for c in calls]}"
        )
        plain = self.oracle.memo.get(key, lambda: self._compute_want(calls, small=small))
        if not plain:
            self.verdict.unchecked.append("structure: the unmodified model does not run on perturbed parameters")
            return None
        return _Want.from_dict(plain)

    def _compute_want(self, calls: list[_Named], *, small: bool) -> dict[str, Any]:
        accepted = [i for i, c in enumerate(calls) if self._accepts(c)]
        why = f"structure was judged in fp32 only: {self.fp32}" if self.fp32 else ""
        wide = "fp64" if self.compiled else "lifted"
        for precision in ("fp32",) if self.fp32 else (wide, "fp32"):
            chosen = [calls[i] for i in accepted]
            if not chosen:
                return {}
            model = self._base(precision)
            with _precise(precision, compiled=self.compiled):
                sequence = [(_at(c.call, precision), c.seed) for c in [*chosen, chosen[0]]]
                seen = observe(model, sequence, self.mode)
                gradients = None
                if self.mode is Mode.TRAINING and not seen.error:
                    batch = _at(self._batch(small=small), precision)
                    gradients = gradients_of(model, loss_of(self.subject.workload), batch, self.seed)
            if seen.error:
                why = f"structure was judged in fp32 only, for fp64 raises: {seen.error}"
                continue
            budgets = self._budgets(chosen, seen, precision)
            allowed = _GRADIENTS * max(budgets)
            if gradients is not None and precision != "lifted":
                allowed = max(allowed, _HARD_CASTS * self._cast_gradients(gradients, small=small))
            return _Want(accepted, precision, seen, budgets, gradients, allowed, why).as_dict()
        return {}

    def _cast_gradients(self, mine: Gradients, *, small: bool) -> float:
        """Return what hard-coded casts, those of the loss among them, cost the reference's own gradients."""
        with _precise("lifted", compiled=False):
            batch = _at(self._batch(small=small), "lifted")
            exact = gradients_of(self._base("lifted"), loss_of(self.subject.workload), batch, self.seed)
        if exact.error or mine.error:
            return 0.0
        found = gradient_checks(mine, exact, gate=Gate.STRUCTURE, floor=_GRADIENT_FLOOR, budget=math.inf)
        return max((c.error for c in found if math.isfinite(c.error)), default=0.0)

    def _accepts(self, named: _Named) -> bool:
        def compute() -> bool:
            model = self._base("fp32")
            out, error = attempt(lambda: run(model, clone_call(named.call), self.mode, named.seed))
            return not error and not flatten(out).has_nan()

        key = f"perturbed accepts {self.oracle.identity} {self.seed} {digest_of(named.call)} {named.seed}"
        return bool(self.oracle.memo.get(key, compute))

    def _budgets(self, calls: list[_Named], seen: Observed, precision: str) -> list[float]:
        """Return what each call may differ by, in fp32 or with hard-coded casts by what those cost the reference."""
        if precision == "lifted":
            return [NEAR_EXACT] * (len(calls) + 1)
        floor = NEAR_EXACT if precision == "fp64" else _FP32
        model = self._base("lifted")
        with _precise("lifted", compiled=False):
            exact = observe(model, [(_at(c.call, "lifted"), c.seed) for c in calls], self.mode)
        if precision == "fp32" and not exact.error:
            floor = _FP32_LEAST
        out = []
        for mine, theirs in zip(seen.outputs, exact.outputs, strict=False):
            own = max((e.row for e in compare_values(mine, theirs).values() if not e.discrete), default=0.0)
            out.append(max(floor, _HARD_CASTS * own))
        out += [floor] * (len(calls) - len(out))
        return out + out[:1]

    def _compare(self, want: _Want, seen: Observed, gradients: Gradients | None, calls: Sequence[_Named]) -> None:
        checks = self.verdict.checks
        if seen.error:
            self._fail("runs", f"raises at {seen.error}; the unmodified model does not")
            return
        names = [*(c.name for c in calls), f"{calls[0].name}, again"]
        for i, name in enumerate(names):
            found = structure_checks(seen.outputs[i], want.seen.outputs[i], case=name, gate=Gate.STRUCTURE, lifted=True)
            bad = [c for c in found if not c.passed]
            if bad:
                checks += bad
                continue
            for path, error in compare_values(seen.outputs[i], want.seen.outputs[i]).items():
                budget = 0.0 if error.discrete and want.precision == "lifted" else want.budgets[i]
                if error.discrete and want.precision != "lifted":
                    budget = max(budget, 3 / max(error.count, 1))
                detail = f"differs by {error.row:.2g} in {want.precision}" if not error.row <= budget else ""
                checks.append(Check(path, Gate.STRUCTURE, error.row, budget, detail, name))
        for name, delta in want.seen.deltas.items():
            mine = seen.deltas.get(name)
            error_ = math.inf if mine is None or mine.shape != delta.shape else tensor_error(mine, delta).row
            budget = max(1e-6, *want.budgets)
            detail = "is not updated as the reference does" if not error_ <= budget else ""
            checks.append(Check(f"buffer {name}", Gate.STRUCTURE, error_, budget, detail))
        extra = sorted(set(seen.deltas) - set(want.seen.deltas))
        if extra:
            self._fail(f"buffer {extra[0]}", "is changed by a call; the reference leaves it")
        if want.gradients is not None and gradients is not None:
            checks += gradient_checks(
                gradients, want.gradients, gate=Gate.STRUCTURE, floor=_GRADIENT_FLOOR, budget=want.gradient_budget
            )

    def _locate(self, want: _Want, calls: Sequence[_Named]) -> None:
        plain = Candidate(tuple(s for s in self.part.steps if not compiles(s)))
        if self.compiled and not plain.steps:
            return
        failed = {c.case for c in self.verdict.checks if not c.passed}
        named = next((c for c in calls if c.name in failed), calls[0])
        built, error = attempt(lambda: self._build(plain, want.precision))
        if error:
            return
        reference = self._base(want.precision)
        with _precise(want.precision, compiled=False):
            self.verdict.diverged_at = first_difference(
                built.model,
                routed(built),
                reference,
                _at(named.call, want.precision),
                self.mode,
                seed=named.seed,
                tolerance=max(want.budgets),
            )

    def _fail(self, name: str, detail: str) -> None:
        self.verdict.checks.append(Check(name, Gate.STRUCTURE, math.inf, 0.0, detail))
