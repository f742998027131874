"""Search on every architecture of the suite: each must end in a valid plan, without a crash.

    python benchmarks/breadth.py              # all of it, into benchmarks/results/DEVICE/breadth.json; resumable
    python benchmarks/breadth.py --sample 6   # a sample that rotates by the day

An architecture counts only where at least one candidate other than the unmodified model reached the numerics gates.
One whose library does not import here is listed with the reason and does not count.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime as dt
import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from architectures import ARCHITECTURES

from kernel_pytorch.hardware import detect
from kernel_pytorch.plan.store import load_plan

HERE = Path(__file__).resolve().parent


def search(name: str, budget_s: float, exclude: list[str], slots: queue.Queue[str]) -> dict[str, Any]:
    """Run one search as a user would, on cores of its own where several run at a time, and return its row."""
    cores = slots.get()
    try:
        return search_on(cores, name, budget_s, exclude)
    finally:
        slots.put(cores)


def search_on(cores: str, name: str, budget_s: float, exclude: list[str]) -> dict[str, Any]:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="breadth-") as directory:
        command = [sys.executable, "-m", "kernel_pytorch", "optimize", f"{HERE / 'architectures.py'}:{name}"]
        command += ["--budget", str(budget_s), "-o", directory, "--format", "json"]
        if cores:
            command = ["taskset", "--cpu-list", cores, *command]
        for transform in exclude:
            command += ["--exclude", transform]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20 * budget_s + 300, check=False)
        except subprocess.TimeoutExpired:
            return {"name": name, "status": "hung", "seconds": time.monotonic() - started}
        row: dict[str, Any] = {"name": name, "exit": done.returncode, "seconds": round(time.monotonic() - started, 1)}
        if done.returncode == 2 and "No module named" in done.stderr:
            return {**row, "status": "not importable", "reason": last_line(done.stderr)}
        if done.returncode != 0 or "Traceback" in done.stderr:
            return {**row, "status": "failed", "reason": done.stderr[-1500:]}
        plan = load_plan(directory)
    trials = [t for t in plan.evidence if t.candidate.steps]
    judged = [t for t in trials if t.numerics is not None]
    ratio = plan.chosen.measurement.ratio if plan.chosen.measurement else None
    return {
        **row,
        "status": "plan",
        "counts": bool(judged),
        "improved": bool(plan.candidate.steps),
        "chosen": plan.candidate.label,
        "speedup": None if ratio is None else [ratio.value, ratio.low, ratio.high],
        "judged": len(judged),
        "trials": {t.candidate.label: [t.status.value, t.reason] for t in trials},
        "untried": len(plan.untried),
        "skipped": len(plan.skipped),
        "parameters": plan.workload.parameters,
    }


def last_line(text: str) -> str:
    lines = [x for x in text.strip().splitlines() if x.strip()]
    return lines[0] if lines else ""


def summary(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {
        "architectures": len(rows),
        "not_importable": sum(r["status"] == "not importable" for r in rows),
        "valid_plans": sum(r["status"] == "plan" for r in rows),
        "counted": sum(bool(r.get("counts")) for r in rows),
        "improved": sum(bool(r.get("improved")) for r in rows),
        "failed": sum(r["status"] in ("failed", "hung") for r in rows),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="where the rows are written")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds a search")
    parser.add_argument("--sample", type=int, help="only so many architectures, others on another day")
    parser.add_argument("--only", nargs="*", help="architectures by name")
    parser.add_argument("--exclude", nargs="*", default=[], help="transforms not to try")
    parser.add_argument("--jobs", type=int, default=1, help="searches at a time, each on its share of the cores")
    args = parser.parse_args()
    if not (args.output or args.sample or args.only):
        args.output = HERE / "results" / detect("cpu").key / "breadth.json"
    names = args.only or list(ARCHITECTURES)
    if args.sample:
        day = dt.datetime.now(dt.UTC).timetuple().tm_yday
        shuffled = random.Random(0).sample(names, len(names))
        names = [shuffled[(day * args.sample + i) % len(names)] for i in range(min(args.sample, len(names)))]
    old = json.loads(args.output.read_text())["rows"] if args.output and args.output.exists() else []
    rows = {r["name"]: r for r in old if r["status"] == "plan"}
    slots: queue.Queue[str] = queue.Queue()
    share = max(1, (os.cpu_count() or 1) // args.jobs)
    for i in range(args.jobs):
        slots.put(f"{i * share}-{(i + 1) * share - 1}" if args.jobs > 1 else "")
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        pending = {pool.submit(search, n, args.budget, args.exclude, slots): n for n in names if n not in rows}
        for future in concurrent.futures.as_completed(pending):
            row = future.result()
            rows[row["name"]] = row
            value = f"{row['speedup'][0]:.2f}x" if row.get("speedup") else ""
            print(
                f"{row['name']:30s} {row['status']:15s} {value:7s} {row.get('chosen', row.get('reason', ''))}",
                flush=True,
            )
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                ordered = [rows[n] for n in ARCHITECTURES if n in rows]
                facts = {"budget_s": args.budget, "jobs": args.jobs, "cores_a_search": share, "excluded": args.exclude}
                text = json.dumps({"summary": summary(ordered), **facts, "rows": ordered}, indent=1)
                args.output.write_text(text + "\n")
    if args.sample:  # beside other work twenty seconds may end before the first candidate was judged
        for name in [n for n in names if rows[n]["status"] == "plan" and not rows[n]["counts"]]:
            print(
                f"{name}: no candidate was judged in {args.budget:.0f} s; again with {3 * args.budget:.0f} s",
                flush=True,
            )
            rows[name] = search(name, 3 * args.budget, args.exclude, slots)
    chosen = [rows[n] for n in names]
    counts = summary(chosen)
    print(json.dumps(counts))
    short = counts["architectures"] - counts["not_importable"] - counts["counted"]
    return 1 if counts["failed"] or short else 0


if __name__ == "__main__":
    sys.exit(main())
