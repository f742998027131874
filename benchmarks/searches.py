"""One search on each job of the zoo, as a user would run it, and what came of it.

    python benchmarks/searches.py -o OUT                                 # all of `model_zoo.JOBS`, resumable
    python benchmarks/searches.py -o OUT --only bert_large unet_train --budget 120 --deadline 480

Each search is `kpt optimize` in a process of its own. `OUT/searches/NAME.json` is its plan, `OUT/searches.json` has a
row for each job. `over_compile` is the chosen candidate's speed-up over that of the best single `compile` step the same
search measured: what the rest of the catalog adds to torch.compile; null where the search tried `compile` only with
other steps. That step's figure is the best of a few screenings and so flattered, unless it was confirmed; the chosen
one's is a confirmation on fresh samples.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from model_zoo import JOBS

from kernel_pytorch.core.types import Plan, Ratio, Status, Trial
from kernel_pytorch.errors import PlanError
from kernel_pytorch.plan.store import load_plan
from kernel_pytorch.report import reading

ZOO = Path(__file__).resolve().parent / "model_zoo.py"
LIBRARIES = ("torch", "triton", "transformers", "torchvision", "torchao")


def installed(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def interval(ratio: Ratio | None) -> list[float] | None:
    return None if ratio is None else [ratio.value, ratio.low, ratio.high]


def best_compile(trials: list[Trial]) -> Trial | None:
    """Return the fastest usable trial of a candidate that is one `compile` step and nothing else."""
    alone = [
        t
        for t in trials
        if [s.transform for s in t.candidate.steps] == ["compile"] and t.status is Status.OK and t.measurement
    ]
    return max(alone, key=lambda t: t.measurement.ratio.value if t.measurement else 0.0, default=None)


def peaks(plan: Plan) -> tuple[int | None, int | None]:
    """Return the peak memory of the unmodified model and of the chosen one, in bytes."""
    unmodified = [t.measurement.peak_bytes for t in plan.evidence if t.measurement and not t.candidate.steps]
    measured = plan.chosen.measurement
    before = measured.baseline_peak_bytes if measured else unmodified[-1] if unmodified else None
    return before, measured.peak_bytes if measured and plan.candidate.steps else before


def outcome(plan: Plan) -> dict[str, Any]:
    """Return the row of a search that ended in a plan."""
    trials = reading.rank(plan)  # one a candidate: a confirmation replaces the screening
    tried = [t for t in trials if t.candidate.steps]
    counts = Counter(t.status for t in tried)
    ratio, compiled = reading.speedup(plan.chosen), best_compile(trials)
    compiled_ratio = compiled.measurement.ratio if compiled and compiled.measurement else None
    before, after = peaks(plan)
    measured = plan.chosen.measurement
    return {
        "status": "plan",
        "device": plan.device.key,
        "workload": plan.workload.name,
        "parameters": plan.workload.parameters,
        "chosen": reading.short(plan.candidate),
        "speedup": interval(ratio),
        "baseline_ms": measured.baseline_median_ms if measured else None,
        "chosen_ms": measured.median_ms if measured else None,
        "best_compile": reading.short(compiled.candidate) if compiled else None,
        "best_compile_phase": compiled.phase if compiled else None,
        "best_compile_speedup": interval(compiled_ratio),
        "over_compile": ratio.value / compiled_ratio.value if ratio and compiled_ratio else None,
        "search_seconds": plan.search_seconds,
        "tried": len(tried),
        "wrong": counts[Status.WRONG],
        "failed": counts[Status.FAILED] + counts[Status.OOM] + counts[Status.TIMEOUT],
        "untried": len(plan.untried),
        "skipped": len(plan.skipped),
        "peak_bytes_before": before,
        "peak_bytes_after": after,
        "lost": {
            reading.short(t.candidate): f"{t.status}: {reading.why(plan, t)}"
            for t in tried
            if t.status is not Status.OK
        },
    }


def ending(text: str | bytes | None) -> str:
    """Return the last lines of a log, where its error is."""
    said = text.decode(errors="replace") if isinstance(text, bytes) else text or ""
    return "\n".join([line for line in said.splitlines() if line.strip()][-8:])[-1200:]


def search(name: str, budget_s: float, timeout_s: float, exclude: list[str], keep: Path) -> dict[str, Any]:
    """Run one search and return its row; its plan is copied to `keep`."""
    function, mode = JOBS[name]
    row: dict[str, Any] = {"name": name, "mode": mode, "budget_s": budget_s}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="searches-") as directory:
        command = [sys.executable, "-m", "kernel_pytorch", "optimize", f"{ZOO}:{function}", "--mode", mode]
        command += ["--budget", str(budget_s), "-o", directory, "--format", "json"]
        for transform in exclude:
            command += ["--exclude", transform]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired as error:
            reason = f"did not end within {timeout_s:.0f} s\n{ending(error.stderr)}"
            return {**row, "status": "hung", "seconds": timeout_s, "reason": reason}
        row["seconds"] = round(time.monotonic() - started, 1)
        if done.returncode != 0:
            reason = f"exit {done.returncode}\n{ending(done.stderr) or ending(done.stdout)}"
            return {**row, "status": "failed", "reason": reason}
        try:
            plan = load_plan(directory)
        except PlanError as error:
            return {**row, "status": "failed", "reason": str(error)}
        keep.parent.mkdir(parents=True, exist_ok=True)
        keep.write_text((Path(directory) / "plan.json").read_text())
    return {**row, **outcome(plan)}


def write(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Write the artefact whole or not at all: a run may be cut off at any time."""
    ordered = [rows[n] for n in JOBS if n in rows] + [row for n, row in rows.items() if n not in JOBS]
    facts = {"tiny": os.environ.get("KPT_ZOO_TINY") == "1", "software": {x: installed(x) for x in LIBRARIES}}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({**facts, "rows": ordered}, indent=1) + "\n")
    part.replace(path)


def line(row: dict[str, Any]) -> str:
    """Return a row for people."""
    head = f"{row['name']:22s}"
    if row["status"] != "plan":
        return f"{head} {row['status'].upper()}: {row['reason'].splitlines()[-1][:120]}"
    value, low, high = row["speedup"] or (1.0, 1.0, 1.0)
    over = f"{row['over_compile']:5.2f}" if row["over_compile"] else "    -"
    memory = [row["peak_bytes_before"], row["peak_bytes_after"]]
    used = "-" if None in memory else " > ".join(f"{b / 2**30:.1f}" for b in memory)
    counts = f"{row['tried']}/{row['wrong']}/{row['failed']}"
    return (
        f"{head} {f'{value:.2f} [{low:.2f}, {high:.2f}]':>18s} {over:>8s} {row['search_seconds']:6.0f} {counts:>9s} "
        f"{used:>15s}  {row['chosen']}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory of searches.json and searches/")
    parser.add_argument("--only", nargs="+", choices=list(JOBS), metavar="NAME", help="jobs by name, in this order")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds a search")
    parser.add_argument("--timeout", type=float, help="seconds after which a search is given up; 2 budgets and 300")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which no search is begun")
    parser.add_argument("--exclude", nargs="*", default=[], help="transforms not to try")
    parser.add_argument("--retry", action="store_true", help="search again where the row is a failure")
    args = parser.parse_args()
    started = time.monotonic()
    timeout_s = args.timeout or 2 * args.budget + 300
    path = args.output / "searches.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {r["name"]: r for r in old if not (args.retry and r["status"] != "plan")}
    names = args.only or list(JOBS)
    left = []
    for name in names:
        if name in rows:
            continue
        if time.monotonic() - started >= args.deadline:
            left.append(name)
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows[name] = search(name, args.budget, timeout_s, args.exclude, args.output / "searches" / f"{name}.json")
        write(path, rows)
    columns = f"{'job':22s} {'speed-up [95 %]':>18s} {'/compile':>8s} {'s':>6s} {'t/w/f':>9s} {'GiB':>15s}  chosen"
    print(f"t/w/f: candidates tried, wrong, failed; GiB: peak before > after\n{columns}")
    for name in names:
        if name in rows:
            print(line(rows[name]))
    if left:
        print(f"not begun before the deadline: {' '.join(left)}")
    return 1 if any(rows[n]["status"] != "plan" for n in names if n in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
