"""What a check runs in a process of its own: the plan's numerics through every gate, then the turns of both models.

Samples are written to a file as they come, so that a crash, a hang or Ctrl-C loses none of them.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from kernel_pytorch import errors
from kernel_pytorch.backends import manager_for
from kernel_pytorch.catalog import apply_candidate
from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.describe import check_model as check_sanity
from kernel_pytorch.core.describe import make_optimizer
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.targets import load_target
from kernel_pytorch.core.types import Candidate, Plan, Ratio, Status, Trial, Verdict
from kernel_pytorch.core.workload import Workload
from kernel_pytorch.errors import KptError
from kernel_pytorch.measure.isolation import unpack
from kernel_pytorch.measure.sampler import calls_per_sample, collect
from kernel_pytorch.plan.apply import check_model, load_compiled
from kernel_pytorch.plan.schema import dumps, loads, trial_dumps, trial_loads
from kernel_pytorch.search.bench import Bench, build, prepare_bench
from kernel_pytorch.search.layers import layer_times
from kernel_pytorch.search.trial import TrialRequest, run_trial
from kernel_pytorch.validation.regression import Judgement, Sequential, judge_pairs

__all__ = ["Asked", "Seen", "as_payload", "read_answer", "read_samples", "run_job", "try_plan"]

_CALIBRATIONS = 3


@dataclass(frozen=True, slots=True)
class Asked:
    """What to run.

    Attributes:
        plan: The plan.
        config: Its configuration, with what the user changed.
        device: As `manager_for` takes it.
        target: What names the workload; or `packed`.
        packed: A parcel with the workload; empty where there is a target.
        artifacts: Directory of the plan's code, where it is trusted; empty else.
        max_seconds: Limit of the timing.
        max_pairs: Pairs of samples at most.
        max_slowdown: The smallest slowdown that matters.
        owed: Speed-up that the plan must show: its time is judged against the unmodified model's over this.
        fixed: Take all pairs and look once, at the end: the samples become evidence of a plan, or confirm a verdict.
        level: Of the validation: quick, standard or strict.
        keep_compiled: Where to keep what is compiled; empty keeps nothing.
        samples: File that gets each pair of samples as a line of JSON.
    """

    plan: Plan
    config: KernelPyTorchConfig
    device: str
    target: str
    packed: str
    artifacts: str
    max_seconds: float
    max_pairs: int
    max_slowdown: float
    owed: float
    fixed: bool
    level: str
    keep_compiled: str
    samples: str


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of it; the samples are in the file.

    Attributes:
        trial: Status, numerics, memory and notes of the plan's candidate.
        judgement: Of the plan's time over what it owes: the unmodified model's over `Asked.owed`.
        telemetry: Of the device while the turns were taken.
        layers_ms: Time by layer, unmodified and with the plan, where the plan turned out slow; else empty.
        confirmed: What fresh processes have shown, where they confirm that it is slow.
    """

    trial: Trial
    judgement: Judgement | None = None
    telemetry: Mapping[str, float] = field(default_factory=dict)
    layers_ms: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    confirmed: str = ""


def as_payload(asked: Asked) -> bytes:
    """Return a request as a worker reads it."""
    plain: dict[str, Any] = {f.name: getattr(asked, f.name) for f in fields(asked)}
    return json.dumps({**plain, "plan": dumps(asked.plan), "config": asked.config.as_json()}).encode()


def run_job(payload: bytes) -> str:
    """Try a plan in a worker and return what was seen, or what was refused, as JSON."""
    raw: dict[str, Any] = json.loads(payload)
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.pop("config").items()}
    asked = Asked(plan=loads(raw.pop("plan")), config=KernelPyTorchConfig(**given), **raw)
    try:
        seen = try_plan(asked, unpack(Path(asked.packed))[0] if asked.packed else None)
    except KptError as error:
        told = {"kind": type(error).__name__, "message": str(error), "fix": error.fix, "trace": error.user_traceback}
        return json.dumps({"refused": told})
    judged = None if seen.judgement is None else asdict(seen.judgement)
    plain = {"judgement": judged, "telemetry": dict(seen.telemetry), "layers_ms": dict(seen.layers_ms)}
    return json.dumps({"trial": trial_dumps(seen.trial), **plain})


def read_answer(text: str) -> Seen:
    """Return what a worker saw.

    Raises:
        KptError: What it refused, as the class it was there.
    """
    raw: dict[str, Any] = json.loads(text)
    if "refused" in raw:
        told = raw["refused"]
        kind = getattr(errors, told["kind"], KptError)
        raise kind(told["message"], fix=told["fix"], user_traceback=told["trace"])
    layers = {k: (float(v[0]), float(v[1])) for k, v in raw["layers_ms"].items()}
    judged = None if raw["judgement"] is None else _judgement(raw["judgement"])
    return Seen(trial_loads(raw["trial"]), judged, raw["telemetry"], layers)


def _judgement(raw: Mapping[str, Any]) -> Judgement:
    changed = {"verdict": Verdict(raw["verdict"]), "change": Ratio(**raw["change"]), "notes": tuple(raw["notes"])}
    return Judgement(**{**raw, **changed})


def read_samples(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the pairs that a file holds: times of the unmodified model and of the plan; a torn last line is left."""
    pairs = []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    for line in lines:
        first, second = json.loads(line)
        pairs.append((float(first), float(second)))
    return tuple(a for a, _ in pairs), tuple(b for _, b in pairs)


def try_plan(asked: Asked, workload: Workload | None = None) -> Seen:
    """Judge a plan's numerics here, and where they hold, time it beside the unmodified model.

    Raises:
        KptError: The target, its inputs or the plan cannot be used.
    """
    config, manager = asked.config, manager_for(asked.device)
    if workload is None:
        workload = load_target(asked.target, trust_remote_code=config.trust_remote_code)
    bench = prepare_bench(workload, config, manager, seed=config.seed)
    check_model(asked.plan, bench.model)
    check_sanity(bench.workload, bench.model, bench.calls, config.mode, bench.batches)
    programs: list[Program] = []

    def deployed(model: nn.Module) -> Program:
        program = build(bench, model, Candidate())
        if asked.artifacts:
            program.artifact_dir, program.trust_artifacts = Path(asked.artifacts), True
            load_compiled(program, manager.spec)
        programs.append(apply_candidate(program, asked.plan.candidate, bench.transforms))
        return programs[-1]

    # Two pairs warm both up and tell their memory; the samples that count are taken below.
    request = TrialRequest(
        asked.plan.candidate,
        phase="confirm" if asked.fixed else "screen",
        seconds=min(asked.max_seconds, 5.0),
        pairs=2,
        seed=config.seed,
        level=asked.level,
        artifact_dir=asked.keep_compiled,
    )
    trial = run_trial(bench, request, deployed)
    if trial.status is not Status.OK:
        return Seen(trial)
    with manager.exclusive():
        manager.telemetry()  # some values count from the call before
        judged = _take_turns(bench, programs[-1], asked)
        telemetry = dict(manager.telemetry())
    layers = trial.layers_ms
    if judged.verdict is Verdict.FAIL and not layers:
        layers, why = _layers(bench, asked.plan.candidate)
        trial = replace(trial, notes=(*trial.notes, *why))
    return Seen(trial, judged, telemetry, layers)


def _layers(bench: Bench, candidate: Candidate) -> tuple[Mapping[str, tuple[float, float]], tuple[str, ...]]:
    try:
        return layer_times(bench, candidate), ()
    except Exception as error:  # noqa: BLE001  a step that fits the model need not fit a layer alone
        return {}, (f"no times by layer: {type(error).__name__}: {error}",)


def _take_turns(bench: Bench, program: Program, asked: Asked) -> Judgement:
    """Sample until it is decided or time is up, and judge the plan's time over what it owes."""
    sides = _sides(bench, program)
    began = time.monotonic()
    sequential = Sequential(asked.max_slowdown, asked.max_pairs)
    series: tuple[list[float], list[float]] = ([], [])
    judged: Judgement | None = None
    written = 0

    def look(*, last: bool) -> Judgement | None:
        owed_ms = [ms / asked.owed for ms in series[0]]
        if not asked.fixed:
            return sequential.look(owed_ms, series[1], last=last)
        return judge_pairs(owed_ms, series[1], max_slowdown=asked.max_slowdown) if last else None

    def late() -> bool:
        nonlocal written, judged
        with Path(asked.samples).open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(pair)}\n" for pair in list(zip(*series, strict=True))[written:])
        written = len(series[0])
        judged = look(last=False)
        return judged is not None or time.monotonic() - began > asked.max_seconds

    def sample(i: int) -> float:
        gc.collect(1)
        gc.disable()
        try:
            series[i].append(sides[i]())
        finally:
            gc.enable()
        return series[i][-1]

    collect(sample, min_pairs=2, max_pairs=asked.max_pairs, confidence=0.95, late=late)
    judged = judged or look(last=True)
    assert judged is not None
    return judged


def _sides(bench: Bench, program: Program) -> tuple[Callable[[], float], Callable[[], float]]:
    """Return functions that take one sample: the time of one call of every case, by its share of the work."""
    optimizer = make_optimizer(bench.workload, bench.model.parameters()) if bench.training else None
    timed = []
    for model, owner in ((bench.model, optimizer), (program.model, program.optimizer)):
        steps = {case: bench.step(model, owner, case) for case in bench.workload.cases}
        timed.append({case: (step, _calls(bench, step)) for case, step in steps.items()})
    return _sampler(bench, timed[0]), _sampler(bench, timed[1])


def _calls(bench: Bench, step: Callable[[], Any]) -> int:
    return calls_per_sample(min(bench.manager.time_ms(step) for _ in range(_CALIBRATIONS)))


def _sampler(bench: Bench, timed: Mapping[str, tuple[Callable[[], Any], int]]) -> Callable[[], float]:
    weights = bench.workload.weights

    def sample() -> float:
        total = 0.0
        for case, (step, calls) in timed.items():

            def several(step: Callable[[], Any] = step, calls: int = calls) -> Any:
                result = None
                for _ in range(calls):
                    result = step()
                return result

            total += weights[case] * bench.manager.time_ms(several) / calls
        return total

    return sample
