"""One candidate, tried: applied to a fresh model, judged, and only then timed beside the unmodified model.

The one place where a broad `except` is right: a candidate, and the user's own model under it, may raise anything.
"""

from __future__ import annotations

import hashlib
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.utils import _pytree as pytree

from kernel_pytorch.backends.placement import release_cached
from kernel_pytorch.core.describe import make_optimizer, training_loss
from kernel_pytorch.core.program import clone_model, ship, state_bytes, state_digest
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import (
    Candidate,
    Check,
    Gate,
    Measurement,
    Numerics,
    NumericsReport,
    Status,
    Step,
    Trial,
)
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.measure.sampler import compare
from kernel_pytorch.measure.stats import SCREEN_CONFIDENCE, paired_ratio, screen_stop
from kernel_pytorch.plan.compile_cache import recording
from kernel_pytorch.search.bench import Bench, build
from kernel_pytorch.search.layers import layer_times
from kernel_pytorch.validation.numerics import Subject, judge
from kernel_pytorch.validation.recompile import fail_on_recompile_limit

_HOPELESS = 8.0
"""A candidate that takes so many times the original's time, and over a second, is not judged."""
_LEAST_SECONDS = 1.0
"""A case with a small weight is measured at least this long: two pairs bound nothing."""

__all__ = ["TrialRequest", "failure", "run_trial", "weighted"]


@dataclass(frozen=True, slots=True)
class TrialRequest:
    """What to try, and how long to measure it.

    Attributes:
        candidate: The steps.
        phase: `screen` or `confirm`.
        seconds: How long the interleaved measurement may take.
        pairs: Number of pairs, fixed beforehand, of a confirmation; 0 lets the samples decide (a screening).
        seed: Seed of the inputs; a confirmation uses one that no screening saw.
        memo_dir: Where validators share oracle outputs and structural verdicts.
        level: Of the validation: quick, standard or strict.
        artifact_dir: Where what the first calls compile is kept for the plan to carry; empty keeps nothing.
    """

    candidate: Candidate
    phase: str = "screen"
    seconds: float = 4.0
    pairs: int = 0
    seed: int = 0
    memo_dir: str = ""
    level: str = "standard"
    artifact_dir: str = ""


def run_trial(bench: Bench, request: TrialRequest, make: Callable[[nn.Module], Program] | None = None) -> Trial:
    """Try one candidate: apply, judge, then measure beside the unmodified model. Never raises for the candidate.

    Args:
        bench: The unmodified model and its inputs.
        request: What to try.
        make: Builds what ships from a copy of the model; by default from the steps alone, without artifacts.
    """
    started = time.perf_counter()
    spent: dict[str, float] = {}
    program: Program | None = None
    try:
        with ExitStack() as stack:
            stack.enter_context(_deterministic(request.seed))
            stack.enter_context(fail_on_recompile_limit())
            with _timed(spent, "apply"):
                copy = clone_model(bench.model)
                program = make(copy) if make else build(bench, copy, request.candidate)
                shipped = ship(program, bench.model)
            kept = recording(Path(request.artifact_dir), bench.manager.spec) if request.artifact_dir else nullcontext()
            with _timed(spent, "first_calls"), kept:
                compile_seconds, wrong = _first_calls(bench, shipped, program.fused_loss)
            with _timed(spent, "judge"):
                report = NumericsReport(wrong) if wrong else _judge(bench, request, program)
            release_cached()
            trial = Trial(
                request.candidate,
                Status.OK if report.passed else Status.WRONG,
                reason=_why(report),
                numerics=report,
                phase=request.phase,
            )
            if report.passed:
                with _timed(spent, "measure"):
                    measured = _measure(bench, request, program, shipped)
                trial = replace(trial, measurement=replace(measured, compile_seconds=compile_seconds))
    except Exception as error:  # the candidate, or the user's model under it, raised: that is a result
        trial = failure(request, error)
    notes = list(dict.fromkeys(program.notes)) if program is not None else []
    if request.phase == "confirm" and trial.status is Status.OK:
        try:
            with _timed(spent, "layers"):
                trial = replace(trial, layers_ms=layer_times(bench, request.candidate))
        except Exception as error:  # a step that fits the model need not fit a layer alone
            notes.append(f"no times by layer: {type(error).__name__}: {error}")
    return replace(trial, notes=tuple(notes), seconds=time.perf_counter() - started, spent_s=spent)


@contextmanager
def _timed(spent: dict[str, float], what: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        spent[what] = time.perf_counter() - started


def failure(request: TrialRequest, error: Exception) -> Trial:
    """Return the trial of a candidate that raised."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:400]
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    status = Status.OOM if out_of_memory else Status.FAILED
    return Trial(request.candidate, status, reason=text + where, phase=request.phase)


@contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _first_calls(
    bench: Bench, shipped: nn.Module, fused: Callable[[Any, Any], torch.Tensor] | None
) -> tuple[float, tuple[Check, ...]]:
    """Run every case twice; return what the first runs took beyond the second (the compile time), and what was NaN.

    In training also the gradients of the first calls: state that is new then (a scale not yet known) is not later.

    Buffers that a call updates (BatchNorm statistics) are put back: the validator compares them with the reference's.

    Raises:
        CandidateError: A call takes so much longer than the unmodified model's that judging it is a waste.
    """
    total = 0.0
    wrong: list[Check] = []
    before = [(b, b.detach().clone()) for m in (shipped, bench.model) for b in m.buffers()]
    for case in bench.workload.cases:
        norms: list[torch.Tensor] = []
        step = _probe_step(bench, shipped, case, fused, norms)
        outputs: list[Any] = []
        first = bench.manager.time_ms(lambda step=step, out=outputs: out.append(step()))  # type: ignore[misc]
        second = bench.manager.time_ms(lambda step=step, out=outputs: out.append(step()))  # type: ignore[misc]
        total += max(0.0, first - second) / 1e3
        if any(torch.isnan(x).any() for x in pytree.tree_leaves(outputs) if _is_float(x)):
            wrong.append(Check("finite", Gate.CONTRACT, math.inf, 0.0, "NaN in one of the first calls", case))
        elif norms and not all(bool(torch.isfinite(n).all()) for n in norms):
            usual: list[torch.Tensor] = []
            _probe_step(bench, bench.model, case, None, usual)()
            if all(bool(torch.isfinite(n).all()) for n in usual):
                what = f"{sum(int((~torch.isfinite(n)).sum()) for n in norms)} gradients of the first calls not finite"
                wrong.append(Check("finite", Gate.CONTRACT, math.inf, 0.0, what, case))
        unmodified = _probe_step(bench, bench.model, case)
        if second > 1000.0 and second > _HOPELESS * min(bench.manager.time_ms(unmodified) for _ in range(2)):
            raise CandidateError(
                f"not judged: a call takes {second / 1e3:.1f} s, over {_HOPELESS:g} times the original's"
            )
    with torch.no_grad():
        for buffer, value in before:
            if not torch.equal(buffer, value):  # `_version` misses what BatchNorm writes
                buffer.copy_(value)
    return total, tuple(wrong)


def _is_float(leaf: object) -> TypeGuard[torch.Tensor]:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _probe_step(
    bench: Bench,
    model: nn.Module,
    case: str,
    fused: Callable[[Any, Any], torch.Tensor] | None = None,
    norms: list[torch.Tensor] | None = None,
) -> Callable[[], Any]:
    """Return a call that leaves the parameters alone: a forward, in training with its backward.

    To `norms` it adds the norms of all gradients of each call.
    """
    if not bench.training:
        return bench.step(model, None, case)
    loss, batch = fused or training_loss(bench.workload), bench.batches[case]

    def forward_backward() -> Any:
        value = loss(model, batch)
        value.backward()  # type: ignore[no-untyped-call]
        if norms is not None:
            grads = [p.grad for p in model.parameters() if p.grad is not None and p.grad.layout is torch.strided]
            norms.extend(n.double() for n in torch._foreach_norm(grads))  # noqa: SLF001
        model.zero_grad(set_to_none=True)
        return value

    return forward_backward


def _judge(bench: Bench, request: TrialRequest, program: Program) -> NumericsReport:
    by_name = {t.name: t for t in bench.transforms}

    def structural(step: Step) -> bool:
        return by_name[step.transform].numerics is not Numerics.LOWER_PRECISION

    subject = Subject(
        workload=bench.workload,
        candidate=request.candidate,
        config=bench.config,
        reference=bench.model,
        program=program,
        build=lambda model, candidate, calls: build(bench, model, candidate, calls),
        place=bench.manager.place,
        structural=structural,
        memo_dir=_memo(bench, request),
    )
    return judge(subject, level=request.level)


def _memo(bench: Bench, request: TrialRequest) -> Path | None:
    """Return where verdicts on this very model are shared: a factory may give other weights in each trial."""
    if not request.memo_dir:
        return None
    digest = hashlib.sha256(repr(state_digest(bench.model)).encode()).hexdigest()
    return Path(request.memo_dir) / digest[:16]


def _why(report: NumericsReport) -> str:
    worst = report.worst
    if report.passed or worst is None:
        return "" if report.passed else "nothing could be compared"
    what = worst.detail or f"error {worst.error:.3g} over the budget of {worst.budget:.3g}"
    return f"{worst.gate}: {worst.name}: {what}" + (f" (case {worst.case})" if worst.case else "")


def _measure(bench: Bench, request: TrialRequest, program: Program, shipped: nn.Module) -> Measurement:
    """Time every case interleaved with the unmodified model, and weight them into one series."""
    optimizer = make_optimizer(bench.workload, bench.model.parameters()) if bench.training else None
    stop = None if request.pairs else screen_stop(bench.config.min_gain)
    parts: list[tuple[float, Measurement]] = []
    for case, weight in bench.workload.weights.items():
        part = compare(
            bench.manager,
            bench.step(bench.model, optimizer, case),
            bench.step(shipped, program.optimizer, case, program.fused_loss),
            max_seconds=max(request.seconds * weight, _LEAST_SECONDS),
            min_pairs=request.pairs or 8,
            max_pairs=request.pairs or 200,
            confidence=0.95 if request.pairs else SCREEN_CONFIDENCE,
            stop=stop,
        )
        parts.append((weight, replace(part, ratio=paired_ratio(part.baseline_samples_ms, part.samples_ms))))
    whole = weighted(parts)
    return replace(
        whole,
        peak_bytes=_plus(whole.peak_bytes, state_bytes(shipped)),
        baseline_peak_bytes=_plus(whole.baseline_peak_bytes, state_bytes(bench.model)),
    )


def _plus(peak_bytes: int | None, held_bytes: int) -> int | None:
    """Return the peak of a call, which the device counts above what was held, with the weights that were held."""
    return None if peak_bytes is None else peak_bytes + held_bytes


def weighted(parts: Sequence[tuple[float, Measurement]]) -> Measurement:
    """Return one measurement of a mix of cases: sample i is the weighted sum of the cases' samples i."""
    if len(parts) == 1:
        return parts[0][1]
    pairs = min(len(m.samples_ms) for _, m in parts)
    ours = tuple(sum(w * m.samples_ms[i] for w, m in parts) for i in range(pairs))
    base = tuple(sum(w * m.baseline_samples_ms[i] for w, m in parts) for i in range(pairs))
    peaks = [m.peak_bytes for _, m in parts if m.peak_bytes is not None]
    base_peaks = [m.baseline_peak_bytes for _, m in parts if m.baseline_peak_bytes is not None]
    return Measurement(
        samples_ms=ours,
        baseline_samples_ms=base,
        ratio=paired_ratio(base, ours),
        peak_bytes=max(peaks, default=None),
        baseline_peak_bytes=max(base_peaks, default=None),
        telemetry=parts[0][1].telemetry,
    )
