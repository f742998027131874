"""False alarms of the validator: faithful transforms, fresh inputs and seeds in every run; none may be rejected.

    python benchmarks/faithful.py            # 220 runs or so; skips runs that are in the artefact already
    python benchmarks/faithful.py --runs 20  # a sample, nothing written

Runs go to benchmarks/results/<device-key>/faithful.json as they finish.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tests.faults.faithful import FAITHFUL  # noqa: E402
from tests.faults.harness import applies, bench_for, catalogue, try_untimed  # noqa: E402
from tests.faults.models import MODELS  # noqa: E402

from kernel_pytorch.core.types import Candidate, Mode, Status, Step, Trial  # noqa: E402
from kernel_pytorch.hardware import detect  # noqa: E402
from kernel_pytorch.search.trial import TrialRequest  # noqa: E402

MAX_ERROR = 0.3
"""Of the runs with a lower-precision step: high, so that an honest error is not mistaken for a false alarm."""


@dataclass(frozen=True)
class Run:
    """One faithful candidate on one model with one seed."""

    model: str
    mode: Mode
    candidate: Candidate
    seed: int

    @property
    def key(self) -> str:
        """Identify the run."""
        return f"{self.model}/{self.mode.value}/{self.candidate.label}/{self.seed}"


REAL: dict[Mode, tuple[Step, ...]] = {
    Mode.INFERENCE: (
        Step("dtype", {"to": "bfloat16", "how": "cast"}),
        Step("dtype", {"to": "float16", "how": "cast"}),
        Step("dtype", {"to": "bfloat16", "how": "autocast"}),
        Step("channels_last"),
        Step("threads", {"count": 1}),
        Step("attention", {"backend": "math"}),
        Step("prepack"),
        Step("compile", {"mode": "default"}),
        Step("regional_compile", {"block": "BertLayer"}),
    ),
    Mode.TRAINING: (
        Step("dtype", {"to": "bfloat16", "how": "autocast"}),
        Step("channels_last"),
        Step("threads", {"count": 1}),
        Step("fused_optimizer", {"implementation": "fused"}),
        Step("compile", {"mode": "default"}),
    ),
}
COMPILED_MODELS = ("mlp", "tagger", "convnet", "bert", "vae")
SEEDS = 3
SEEDS_COMPILED = 1


def runs() -> list[Run]:
    """Return every run."""
    known = {t.name for t in catalogue(FAITHFUL)}
    planned = []
    for model in MODELS:
        for mode in Mode:
            steps = [Step(f.name) for f in FAITHFUL if mode in f.modes]
            steps += [s for s in REAL[mode] if s.transform in known]
            for number, step in enumerate(steps):
                compiled = "compile" in step.transform
                if compiled and model not in COMPILED_MODELS:
                    continue
                seeds = [1000 + 37 * number + 7919 * i for i in range(SEEDS_COMPILED if compiled else SEEDS)]
                planned += [Run(model, mode, Candidate((step,)), seed) for seed in seeds]
            low = Step("dtype", {"to": "bfloat16", "how": "cast" if mode is Mode.INFERENCE else "autocast"})
            planned.append(Run(model, mode, Candidate((Step("split_linear"), low)), 5))
    return planned


def try_run(run: Run) -> Trial:
    """Run one candidate as a search would."""
    transforms = catalogue(FAITHFUL)
    by_name = {t.name: t for t in transforms}
    low = any(by_name[s.transform].numerics.value == "lower_precision" for s in run.candidate.steps)
    bench = bench_for(run.model, run.mode, run.seed, MAX_ERROR if low else 2e-2)
    bench.transforms = transforms
    return try_untimed(bench, TrialRequest(run.candidate, seed=run.seed))


def row_of(run: Run, trial: Trial) -> dict[str, Any]:
    """Return a row of the artefact."""
    numerics = trial.numerics
    return {
        "key": run.key,
        "model": run.model,
        "mode": run.mode.value,
        "candidate": run.candidate.label,
        "seed": run.seed,
        "status": trial.status.value if applies(trial) else "n/a",
        "reason": trial.reason[:300],
        "max_rel_error": numerics.max_rel_error if numerics else None,
        "budget": numerics.budget if numerics else None,
        "checks": len(numerics.checks) if numerics else 0,
        "nearest": round(max((c.error / c.budget for c in numerics.checks if c.budget), default=0.0), 4)
        if numerics and trial.status is Status.OK
        else None,
        "seconds": round(trial.seconds, 2),
    }


def results_path() -> Path:
    """Return where this machine's artefact is."""
    return ROOT / "benchmarks" / "results" / detect("cpu").key / "faithful.json"


def judged(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs that reached the validator: PyTorch has no bfloat16 FFT, for instance, so that one cannot."""
    return [r for r in rows.values() if r["status"] not in ("n/a", "failed")]


def write_rows(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Write an artefact; a reader never sees half of one."""
    real = judged(rows)
    document = {
        "what": "each row: one faithful candidate on one model with fresh inputs, parameters perturbed by its own seed",
        "device": detect("cpu").key,
        "software": {"torch": torch.__version__, "python": platform.python_version()},
        "max_error": {
            "lower_precision": MAX_ERROR,
            "others": 2e-2,
            "why": "a run with a lower-precision step is judged with a high max_error, so that only a false alarm"
            " of a derived budget or of another gate counts, not an honest error above the default of 2e-2",
        },
        "level": "standard",
        "runs": len(real),
        "rejected": sum(r["status"] != "ok" for r in real),
        "not_runnable": [f"{r['key']}: {r['reason']}" for r in rows.values() if r["status"] == "failed"],
        "rows": list(rows.values()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print what was rejected, and exit 1 where anything was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=0, help="only so many, spread over all; nothing is written")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--only", default="", help="only candidates whose label contains this")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--max-seconds", type=float, default=float("inf"))
    parser.add_argument("--redo", action="store_true", help="run the selected rows again")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # these models are too small for more
    warnings.filterwarnings("ignore")
    planned = [
        r for r in runs()
        if r.model in options.models and options.only in r.key
        and not (options.no_compile and "compile" in r.candidate.label)
    ]  # fmt: skip
    if options.runs:
        planned = planned[:: max(1, len(planned) // options.runs)][: options.runs]
    path = None if options.runs else results_path()
    rows: dict[str, dict[str, Any]] = {}
    if path is not None and path.exists():
        rows = {r["key"]: r for r in json.loads(path.read_text())["rows"]}
    started = saved = time.monotonic()
    for number, run in enumerate(planned):
        if run.key in rows and not options.redo:
            continue
        if time.monotonic() - started > options.max_seconds:
            print("out of time; run again to go on", file=sys.stderr)
            break
        row = rows[run.key] = row_of(run, try_run(run))
        print(f"[{number + 1}/{len(planned)}] {run.key}: {row['status']} {row['reason']} ({row['seconds']} s)",
              file=sys.stderr, flush=True)  # fmt: skip
        if path is not None and time.monotonic() - saved > 10:
            write_rows(path, rows)
            saved = time.monotonic()
    if path is not None:
        write_rows(path, rows)
    real = judged(rows)
    rejected = [r for r in real if r["status"] != "ok"]
    print(f"{len(real)} runs, {len(rejected)} rejected")
    for row in rejected:
        print(f"{row['key']}: {row['status']}: {row['reason']}")
    return int(bool(rejected))


if __name__ == "__main__":
    sys.exit(main())
