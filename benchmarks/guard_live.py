"""False alarms and power of the guard's live comparisons on this machine, quiet and beside a load that comes and goes.

    python benchmarks/guard_live.py                      # 150 A/A runs each quiet and loaded, 30 of each slowdown
    python benchmarks/guard_live.py --runs 40 --seconds 10 --only aa
    python benchmarks/guard_live.py --device cuda --only all --runs 10 --seconds 8 --deadline 240 -o live.json
    python benchmarks/guard_live.py --summary            # the table of what is there, nothing is run
    python benchmarks/guard_live.py --document           # tables of all devices into docs/guard-statistics.md

Each run is one `compare_sides`: two fresh worker processes, warm-up, turns until the verdict is certain, and a FAIL
confirmed in fresh processes, as `kpt compare` does it. In an A/A run both sides are the same; in the others the head
does so many per cent more of the same work (`guard_live_workloads.py`), whose effect is measured beforehand in one
process with a few hundred pairs. Rows go to benchmarks/results/<device-key>/guard_live.json as they finish, and what is
there already is not run again. INCONCLUSIVE counts as a miss.

`quiet` means that this benchmark adds no load; how busy others kept the machine meanwhile is in each row, and the runs
of `quiet` in which that was less than a tenth of a core are counted once more as `undisturbed`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import re
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
from kernel_pytorch.measure.sampler import ForeignLoad, compare

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DOCUMENT = HERE.parent / "docs" / "guard-statistics.md"
TARGETS = HERE / "guard_live_workloads.py"
WORKLOADS = {
    "cpu": {
        "products": ("inference", "1"),
        "launches": ("inference", "1"),
        "training": ("training", ""),
    },
    "cuda": {
        "gpu_products": ("inference", ""),
        "launches": ("inference", ""),
        "gpu_training": ("training", ""),
    },
}
"""By device: mode, and threads (empty: as many as torch takes by itself)."""
ORDER = {"cpu": ("products", "launches", "training", "products", "launches"), "cuda": tuple(WORKLOADS["cuda"])}
"""On a CPU a training step with threads takes most of the time, and beside other processes is rarely decided."""
CONDITIONS = ("quiet", "load")
SLOWDOWNS = (3, 5, 10)
MAX_SLOWDOWN = 0.03
UNDISTURBED_CORES = 0.1
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


def cells(given: argparse.Namespace) -> list[Cell]:
    """Return what to run, conditions and workloads in turn, so that an interrupted run has some of each."""
    names = (given.workload,) if given.workload else ORDER[given.device]
    slow_runs = max(3, given.runs // 5) if given.slow_runs is None else given.slow_runs
    found = []
    for i in range(max(given.runs, slow_runs)):
        for condition in given.conditions.split(","):
            if given.only in ("aa", "all") and i < given.runs:
                found.append(Cell(condition, names[i % len(names)], 0, i))
            if given.only in ("slow", "all") and i < slow_runs:
                found += [Cell(condition, names[i % len(names)], k, i) for k in SLOWDOWNS]
    return found


def variables(device: str, workload: str) -> dict[str, str]:
    """Return what the environment of a side says about threads, and about GPUs where the CPU is meant."""
    threads = WORKLOADS[device][workload][1]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" and torch.cuda.is_available() else {}
    return {**hidden, **({"OMP_NUM_THREADS": threads} if threads else {})}


def side(device: str, cell: Cell, label: str, extra: int) -> Side:
    env = {"KPT_LIVE_EXTRA": str(extra), **variables(device, cell.workload)}
    return Side(label, f"{TARGETS}:{cell.workload}", mode=WORKLOADS[device][cell.workload][0], env=env)


def be_a_load(directory: Path, driver: int, device: str) -> None:
    """Keep a core (or the GPU) busy, on and off for random times, while there is a file `on`; end with the driver."""
    if os.fork():
        os._exit(0)  # an orphan: a child of the driver would count as the driver's own work
    rng, on = random.Random(time.time_ns()), directory / "on"
    work = _gpu_work() if device == "cuda" else lambda: sum(range(20_000))
    while Path(f"/proc/{driver}").exists() and directory.exists():
        until = time.monotonic() + rng.uniform(0.3, 3.0)
        while time.monotonic() < until and on.exists():
            work()
        until = time.monotonic() + rng.uniform(0.3, 3.0)
        while time.monotonic() < until and directory.exists():
            time.sleep(0.05)
    os._exit(0)


def _gpu_work():
    x = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)

    def work() -> None:
        for _ in range(20):
            x @ x
        torch.cuda.synchronize()

    return work


class Load:
    """A load that comes and goes, outside of this process's tree; started when it is first wanted."""

    def __init__(self, device: str, directory: Path) -> None:
        self.device = device
        self.directory = directory
        self.started = False

    @contextmanager
    def on(self) -> Iterator[None]:
        """Let it work."""
        if not self.started:
            told = [str(self.directory), str(os.getpid()), self.device]
            subprocess.run([sys.executable, __file__, "--be-a-load", *told], check=True)
            self.started = True
        flag = self.directory / "on"
        flag.touch()
        try:
            yield
        finally:
            flag.unlink()


def wait_for_quiet(seconds: float) -> None:
    """Wait, at most so long, for a second in which others kept less than a tenth of a core busy."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        before = ForeignLoad.now()
        time.sleep(1.0)
        if ForeignLoad.now().cores_since(before) < UNDISTURBED_CORES:
            return


def run(device: str, cell: Cell, seconds: float, load: Load) -> dict[str, Any]:
    """Compare once and return the row."""
    began, before = time.monotonic(), ForeignLoad.now()
    with load.on() if cell.condition == "load" else nullcontext():
        found = compare_sides(
            side(device, cell, "base", 0),
            side(device, cell, "head", cell.slowdown),
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
        "seconds": round(time.monotonic() - began, 2),
        "limit_seconds": seconds,
        "foreign_load_cores": round(ForeignLoad.now().cores_since(before), 3),
        "base_ms": [round(x, 5) for x in found.base_samples_ms],
        "head_ms": [round(x, 5) for x in found.head_samples_ms],
    }


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def calibrate(device: str, workload: str, seconds: float) -> list[dict[str, Any]]:
    """Measure what so many per cent more work cost, in one process with many pairs."""
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import guard_live as g;"
        f"import json; print(json.dumps(g.calibrate_here({device!r}, {workload!r}, {seconds})))"
    )
    env = {**os.environ, **variables(device, workload)}
    done = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def calibrate_here(device: str, workload: str, seconds: float) -> list[dict[str, Any]]:
    import guard_live_workloads as targets

    manager, rows = manager_for(device), []
    training = WORKLOADS[device][workload][0] == "training"
    steps = {}
    for extra in (0, *SLOWDOWNS):
        os.environ["KPT_LIVE_EXTRA"] = str(extra)
        made = getattr(targets, workload)()
        torch.manual_seed(0)
        model, x = manager.place(made.model()), manager.place(made.batch("main", 0))
        optimizer = made.optimizer(model.parameters()) if training else None
        steps[extra] = _step(model, x, made.loss, optimizer)
    for slowdown in SLOWDOWNS:
        seen = compare(manager, steps[slowdown], steps[0], max_seconds=seconds, max_pairs=CALIBRATION_PAIRS)
        measured = [seen.ratio.value, seen.ratio.low, seen.ratio.high]
        rows.append({"workload": workload, "slowdown_percent": slowdown, "measured": measured})
    return rows


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
    workloads = [*dict.fromkeys(row["workload"] for row in rows)]
    found = []
    for condition in (*CONDITIONS, "undisturbed"):
        for slowdown in (0, *SLOWDOWNS):
            for workload in ("all", *workloads):
                these = [
                    row
                    for row in rows
                    if _is_of(condition, row)
                    and row["slowdown_percent"] == slowdown
                    and workload in ("all", row["workload"])
                ]
                if these:
                    found.append(_summed(condition, slowdown, workload, these))
    return found


def _is_of(condition: str, row: dict[str, Any]) -> bool:
    if condition == "undisturbed":
        return row["condition"] == "quiet" and row["foreign_load_cores"] < UNDISTURBED_CORES
    return bool(row["condition"] == condition)


def _summed(condition: str, slowdown: int, workload: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    counts = {str(v): sum(row["verdict"] == v for row in rows) for v in Verdict}
    told = {v: counts[v] for v in ("PASS", "FAIL", "INCONCLUSIVE")}
    return {
        "condition": condition,
        "slowdown_percent": slowdown,
        "workload": workload,
        "runs": len(rows),
        **{v.lower(): n for v, n in told.items()},
        "rate_of_fail": counts["FAIL"] / len(rows),
        "interval": interval(counts["FAIL"], len(rows)),
        "median_pairs": _median(row["pairs"] for row in rows),
        "median_seconds": _median(row["seconds"] for row in rows),
        "median_foreign_load_cores": _median(row["foreign_load_cores"] for row in rows),
    }


def _median(values: Iterator[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def results_path(device: str) -> Path:
    return RESULTS / detect(device).key / "guard_live.json"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"rows": [], "calibration": []}


def write(path: Path, found: dict[str, Any], device: str) -> None:
    """Write the artefact; a reader never sees half of one."""
    document = {
        "what": "each row: one live comparison, of a workload with itself (slowdown 0) or with more of the same work",
        "device": detect(device).key,
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
    print(f"{'condition':11} {'slower':>6} {'workload':12} {'runs':>4} {'FAIL':>5} {'PASS':>5} {'?':>4}  rate of FAIL")
    for s in summary(rows):
        low, high = s["interval"]
        counts = f"{s['fail']:5} {s['pass']:5} {s['inconclusive']:4}"
        print(
            f"{s['condition']:11} {s['slowdown_percent']:4} % {s['workload']:12} {s['runs']:4} {counts}  "
            f"{s['rate_of_fail']:.3f} ({low:.3f} to {high:.3f}), {s['median_pairs']} pairs, "
            f"{s['median_seconds']:.0f} s, others {s['median_foreign_load_cores']:.2f} cores"
        )
    for c in calibration:
        value, low, high = c["measured"]
        print(
            f"{c['workload']}: {c['slowdown_percent']} % more work take {value - 1:+.2%} "
            f"({low - 1:+.2%} to {high - 1:+.2%})"
        )


def table(artefact: dict[str, Any]) -> list[str]:
    """Return the table of one device in Markdown: all workloads of a condition together, then each."""
    names = ("condition", "head does more", "workload", "runs", "`FAIL`", "`PASS`", "`INCONCLUSIVE`")
    names += ("`FAIL`, % (95 %)", "pairs", "s")
    lines = [f"| {' | '.join(names)} |", "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for s in artefact["summary"]:
        low, high = (f"{100 * x:.1f}" for x in s["interval"])
        rate = f"{100 * s['rate_of_fail']:.1f} ({low} to {high})"
        cells = [s["condition"], f"{s['slowdown_percent']} %", s["workload"], s["runs"], s["fail"], s["pass"]]
        cells += [s["inconclusive"], rate, s["median_pairs"], f"{s['median_seconds']:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def rendered(document: str, results: Path = RESULTS) -> str:
    """Return the document with its tables of live runs made anew, one for each device."""
    lines: list[str] = []
    for path in sorted(results.glob("*/guard_live.json")):
        artefact = json.loads(path.read_text(encoding="utf-8"))
        lines += [f"`{artefact['device']}`, torch {artefact['software']['torch']}:", "", *table(artefact), ""]
    marked = re.compile(r"(<!-- table: live -->\n).*?(<!-- end -->)", flags=re.DOTALL)
    text = "\n".join(lines)
    document, count = marked.subn(lambda m: f"{m[1]}\n{text}\n{m[2]}", document)
    if count != 1:
        raise SystemExit(f"{DOCUMENT} has {count} places for the table of live runs")
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=[*WORKLOADS], default="cpu")
    parser.add_argument("--runs", type=int, default=150, help="A/A runs of each condition")
    parser.add_argument("--slow-runs", type=int, help="of each slowdown and condition; by default a fifth, at least 3")
    parser.add_argument("--seconds", type=float, default=15.0, help="limit of one run's sampling")
    parser.add_argument("--deadline", type=float, default=math.inf, help="no run begins after so many seconds")
    parser.add_argument("--only", choices=["all", "aa", "slow"], default="all")
    parser.add_argument("--workload", help="this one only; by default all, in turn")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds a quiet run waits for others to be quiet")
    parser.add_argument("--conditions", default=",".join(CONDITIONS))
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--document", action="store_true", help=f"write the tables of all devices into {DOCUMENT.name}")
    parser.add_argument("--be-a-load", nargs=3, metavar=("DIRECTORY", "PID", "DEVICE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.be_a_load:
        directory, driver, device = given.be_a_load
        be_a_load(Path(directory), int(driver), device)
    if given.document:
        DOCUMENT.write_text(rendered(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
        return
    path = given.output or results_path(given.device)
    found = read(path)
    if not given.summary:
        fill(found, path, given)
    show(found["rows"], found["calibration"])


def fill(found: dict[str, Any], path: Path, given: argparse.Namespace) -> None:
    """Run what is missing, until the deadline."""
    end = time.monotonic() + given.deadline
    done = {row["key"] for row in found["rows"]}
    calibrated = {c["workload"] for c in found["calibration"]}
    with tempfile.TemporaryDirectory() as directory:
        load = Load(given.device, Path(directory))
        for cell in cells(given):
            if cell.key in done:
                continue
            if time.monotonic() > end:
                print("the deadline ended it")
                break
            if cell.slowdown and cell.workload not in calibrated:
                calibrated.add(cell.workload)
                found["calibration"] += calibrate(given.device, cell.workload, given.seconds)
            if cell.condition == "quiet":
                wait_for_quiet(given.wait)
            row = run(given.device, cell, given.seconds, load)
            found["rows"].append(row)
            write(path, found, given.device)
            print(
                f"{cell.key:26} {row['verdict']:12} {row['pairs']:4} pairs {row['seconds']:5.1f} s  "
                f"others {row['foreign_load_cores']:.2f}  {row['reason']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
