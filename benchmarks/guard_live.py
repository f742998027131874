"""False alarms and power of the guard's live comparisons on this machine, quiet and beside a load that comes and goes.

    python benchmarks/guard_live.py                      # 300 A/A runs each quiet and loaded, 60 of each slowdown
    python benchmarks/guard_live.py --runs 40 --seconds 10 --only aa
    python benchmarks/guard_live.py --summary            # the table of what is there, nothing is run

Each run is one `compare_sides`: two fresh worker processes, warm-up, turns until the verdict is certain, and a FAIL
confirmed in fresh processes, as `kpt compare` does it. In an A/A run both sides are the same; in the others the head
does so many per cent more of the same work (`guard_live_workloads.py`), whose effect is measured beforehand in one
process with a few hundred pairs. Rows go to benchmarks/results/<device-key>/guard_live.json as they finish, and what is
there already is not run again. INCONCLUSIVE counts as a miss.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest

from kernel_pytorch.backends import manager_for
from kernel_pytorch.core.types import Verdict
from kernel_pytorch.guard.compare import compare_sides
from kernel_pytorch.guard.side_by_side import Side
from kernel_pytorch.hardware import detect
from kernel_pytorch.measure.sampler import compare

HERE = Path(__file__).resolve().parent
TARGETS = HERE / "guard_live_workloads.py"
WORKLOADS = {
    "products": ("inference", "1"),
    "launches": ("inference", "1"),
    "training": ("training", ""),
}
"""Mode, and threads (empty: as many as torch takes by itself)."""
CONDITIONS = ("quiet", "load")
SLOWDOWNS = (3, 5, 10)
MAX_SLOWDOWN = 0.03
CALIBRATION_PAIRS = 200


@dataclass(frozen=True)
class Cell:
    """One run that is asked for: `slowdown` in per cent, 0 for A/A."""

    condition: str
    workload: str
    slowdown: int
    index: int

    @property
    def key(self) -> str:
        return f"{self.condition}/{self.workload}/{self.slowdown}/{self.index}"


def cells(runs: int, only: str, conditions: list[str]) -> list[Cell]:
    """Return what to run, conditions and workloads in turn, so that an interrupted run has some of each."""
    names = list(WORKLOADS)
    found = []
    for i in range(runs):
        for condition in conditions:
            if only in ("aa", "all"):
                found.append(Cell(condition, names[i % len(names)], 0, i))
            if only in ("slow", "all") and i < max(1, runs // 5):
                found += [Cell(condition, names[i % len(names)], k, i) for k in SLOWDOWNS]
    return found


def side(cell: Cell, label: str, extra: int) -> Side:
    mode, threads = WORKLOADS[cell.workload]
    env = {"KPT_LIVE_EXTRA": str(extra), **({"OMP_NUM_THREADS": threads} if threads else {})}
    return Side(label, f"{TARGETS}:{cell.workload}", mode=mode, env=env)


def be_a_load(flag: str) -> None:
    """Keep one core busy, on and off for random times, as long as the flag's file is there."""
    if os.fork():
        os._exit(0)  # an orphan: a child of the driver would count as the driver's own work
    rng, there = random.Random(time.time_ns()), Path(flag).exists
    while there():
        until = time.monotonic() + rng.uniform(0.3, 3.0)
        while time.monotonic() < until and there():
            sum(range(20_000))
        until = time.monotonic() + rng.uniform(0.3, 3.0)
        while time.monotonic() < until and there():
            time.sleep(0.05)
    os._exit(0)


@contextmanager
def competing_load() -> Iterator[None]:
    """Run a load that comes and goes, outside of this process's tree."""
    with tempfile.TemporaryDirectory() as directory:
        flag = Path(directory) / f"of-{os.getpid()}"
        flag.touch()
        subprocess.run([sys.executable, __file__, "--be-a-load", str(flag)], check=True)
        yield


def run(cell: Cell, seconds: float) -> dict[str, Any]:
    """Compare once and return the row."""
    with competing_load() if cell.condition == "load" else nullcontext():
        found = compare_sides(
            side(cell, "base", 0),
            side(cell, "head", cell.slowdown),
            max_slowdown=MAX_SLOWDOWN,
            max_seconds=seconds,
            profile=False,
            seed=cell.index,
        )
    change = found.change
    return {
        "key": cell.key,
        "condition": cell.condition,
        "workload": cell.workload,
        "slowdown_percent": cell.slowdown,
        "verdict": str(found.verdict),
        "reason": found.reason,
        "pairs": len(found.head_samples_ms),
        "change": None if change is None else [_finite(x) for x in (change.value, change.low, change.high)],
        "seconds": round(found.seconds, 2),
        "foreign_load_cores": round(found.head.telemetry.get("foreign_load_cores", math.nan), 3),
        "base_ms": [round(x, 5) for x in found.base_samples_ms],
        "head_ms": [round(x, 5) for x in found.head_samples_ms],
    }


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def calibrate(workload: str, slowdown: int, seconds: float) -> dict[str, Any]:
    """Measure what so many per cent more work cost, in one process with many pairs."""
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import guard_live as g;"
        f"import json; print(json.dumps(g.calibrate_here({workload!r}, {slowdown}, {seconds})))"
    )
    threads = WORKLOADS[workload][1]
    env = {**os.environ, **({"OMP_NUM_THREADS": threads} if threads else {})}
    done = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def calibrate_here(workload: str, slowdown: int, seconds: float) -> dict[str, Any]:
    import guard_live_workloads as targets

    training = WORKLOADS[workload][0] == "training"
    steps = []
    for extra in (0, slowdown):
        os.environ["KPT_LIVE_EXTRA"] = str(extra)
        made = getattr(targets, workload)()
        torch.manual_seed(0)
        model, x = made.model(), made.batch("main", 0)
        optimizer = made.optimizer(model.parameters()) if training else None
        steps.append(_step(model, x, made.loss, optimizer))
    seen = compare(manager_for(), steps[1], steps[0], max_seconds=seconds, max_pairs=CALIBRATION_PAIRS)
    ratio = seen.ratio
    return {"workload": workload, "slowdown_percent": slowdown, "measured": [ratio.value, ratio.low, ratio.high]}


def _step(model, x, loss, optimizer):
    def infer():
        with torch.no_grad():
            return model(x)

    def train():
        optimizer.zero_grad(set_to_none=True)
        value = loss(model, x)
        value.backward()
        optimizer.step()

    return infer if optimizer is None else train


def interval(count: int, total: int) -> list[float]:
    """Return the Clopper-Pearson interval of a rate, at 95 %."""
    found = binomtest(count, total).proportion_ci(0.95, method="exact")
    return [round(float(found.low), 5), round(float(found.high), 5)]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rates by condition and slowdown: of all workloads together, then of each."""
    found = []
    for condition in CONDITIONS:
        for slowdown in (0, *SLOWDOWNS):
            for workload in ("all", *WORKLOADS):
                these = [
                    r
                    for r in rows
                    if (r["condition"], r["slowdown_percent"]) == (condition, slowdown)
                    and workload in ("all", r["workload"])
                ]
                if not these:
                    continue
                counts = {v: sum(r["verdict"] == v for r in these) for v in ("PASS", "FAIL", "INCONCLUSIVE")}
                found.append(
                    {
                        "condition": condition,
                        "slowdown_percent": slowdown,
                        "workload": workload,
                        "runs": len(these),
                        **{v.lower(): n for v, n in counts.items()},
                        "rate_of_fail": counts[Verdict.FAIL] / len(these),
                        "interval": interval(counts[Verdict.FAIL], len(these)),
                        "median_pairs": sorted(r["pairs"] for r in these)[len(these) // 2],
                        "median_seconds": sorted(r["seconds"] for r in these)[len(these) // 2],
                    }
                )
    return found


def results_path() -> Path:
    return HERE / "results" / detect("cpu").key / "guard_live.json"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"rows": [], "calibration": []}


def write(path: Path, found: dict[str, Any]) -> None:
    """Write the artefact; a reader never sees half of one."""
    document = {
        "what": "each row: one live comparison, of a workload with itself (slowdown 0) or with more of the same work",
        "device": detect("cpu").key,
        "software": {"torch": torch.__version__, "python": platform.python_version()},
        "max_slowdown": MAX_SLOWDOWN,
        "summary": summary(found["rows"]),
        "calibration": found["calibration"],
        "rows": found["rows"],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, allow_nan=False) + "\n")
    partial.replace(path)


def show(rows: list[dict[str, Any]], calibration: list[dict[str, Any]]) -> None:
    print(f"{'condition':9} {'slower':>6} {'workload':9} {'runs':>4} {'FAIL':>5} {'PASS':>5} {'?':>4}  rate of FAIL")
    for s in summary(rows):
        low, high = s["interval"]
        counts = f"{s['fail']:5} {s['pass']:5} {s['inconclusive']:4}"
        print(
            f"{s['condition']:9} {s['slowdown_percent']:5} % {s['workload']:9} {s['runs']:4} {counts}  "
            f"{s['rate_of_fail']:.3f} ({low:.3f} to {high:.3f}), {s['median_pairs']} pairs, "
            f"{s['median_seconds']:.0f} s"
        )
    for c in calibration:
        value, low, high = c["measured"]
        print(
            f"{c['workload']}: {c['slowdown_percent']} % more work take {value - 1:+.2%} "
            f"({low - 1:+.2%} to {high - 1:+.2%})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300, help="A/A runs of each condition; a fifth of each slowdown")
    parser.add_argument("--seconds", type=float, default=15.0, help="limit of one run's sampling")
    parser.add_argument("--only", choices=["all", "aa", "slow"], default="all")
    parser.add_argument("--conditions", default=",".join(CONDITIONS))
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--be-a-load", metavar="FLAG", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.be_a_load:
        be_a_load(given.be_a_load)
    path = given.output or results_path()
    found = read(path)
    if not given.summary:
        fill(found, path, given)
    show(found["rows"], found["calibration"])


def fill(found: dict[str, Any], path: Path, given: argparse.Namespace) -> None:
    """Run what is missing."""
    wanted = cells(given.runs, given.only, given.conditions.split(","))
    known = {(c["workload"], c["slowdown_percent"]) for c in found["calibration"]}
    for workload, slowdown in sorted({(c.workload, c.slowdown) for c in wanted if c.slowdown} - known):
        found["calibration"].append(calibrate(workload, slowdown, given.seconds))
        write(path, found)
    done = {row["key"] for row in found["rows"]}
    for cell in wanted:
        if cell.key in done:
            continue
        row = run(cell, given.seconds)
        found["rows"].append(row)
        write(path, found)
        print(
            f"{cell.key:24} {row['verdict']:12} {row['pairs']:4} pairs {row['seconds']:5.1f} s  {row['reason']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
