"""How alike the two sides of a live comparison are, as their turns are taken, and without what is done for it.

    python benchmarks/guard_turns.py                 # some minutes; results/<device-key>/guard_turns.json
    python benchmarks/guard_turns.py --rounds 1 --seconds 2 -o /tmp/turns.json

Both sides are the same, so every difference within a pair is noise. It is measured with turns as `guard.turns` takes
them; without the wait at the end of a turn until the threads of its process rest (`no_rest`); with each side on
whatever core the system gives it, rather than on the core of the turn before (`own_cores`); and with an untimed call
before every sample, however long it is (`cold_call`). Variants take turns too, and each is of fresh processes.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import guard_live
import torch

from kernel_pytorch.guard import side_by_side
from kernel_pytorch.guard.side_by_side import Limits, WorkerRunner
from kernel_pytorch.guard.turns import take_turns
from kernel_pytorch.hardware import detect
from kernel_pytorch.measure.stats import paired_ratio

WORKER = Path(side_by_side.__file__).with_name("worker.py")
CONSTANTS: dict[str, dict[str, str]] = {"no_rest": {"_RESTLESS": "0"}, "cold_call": {"_COLD_MS": "1e9"}}
"""Constants of the worker that a variant changes."""
VARIANTS = {
    "products": ("as_it_is", "own_cores"),
    "launches": ("as_it_is", "own_cores"),
    "training": ("as_it_is", "no_rest", "cold_call"),
}
"""By workload; one thread has nobody to wait for, and two take both cores of two."""
CONFIDENCE = 0.995
WAIT_S = 10.0


class OnItsOwnCore(WorkerRunner):
    """A side that does not follow the other's core."""

    core = property(lambda _: None, lambda _, __: None)  # type: ignore[assignment]


def changed(constants: dict[str, str], directory: Path) -> Path:
    """Return the worker with other constants, in a file of its own beside the modules that it imports by path."""
    source = WORKER.read_text(encoding="utf-8")
    for name, value in constants.items():
        source, count = re.subn(rf"^{name} = .*$", f"{name} = {value}", source, flags=re.MULTILINE)
        assert count == 1, name
    path = directory / "worker.py"
    path.write_text(source, encoding="utf-8")
    return path


def measure(workload: str, variant: str, seconds: float) -> dict[str, Any]:
    """Take turns for so long and return how alike the sides were."""
    cell = guard_live.Cell("quiet", workload, 0, 0)
    made = OnItsOwnCore if variant == "own_cores" else WorkerRunner
    with tempfile.TemporaryDirectory() as directory:
        side_by_side._WORKER = changed(CONSTANTS.get(variant, {}), Path(directory))
        runners = [made(guard_live.side("cpu", cell, label, 0)) for label in ("base", "head")]
        try:
            for runner in runners:
                runner.begin()
            for runner in runners:
                runner.load(Limits())
            guard_live.wait_for_quiet(WAIT_S)
            limits = Limits(sampling=seconds)
            run = take_turns(*runners, done=lambda *_: False, limits=limits, max_pairs=100_000, seed=time.time_ns())
        finally:
            for runner in runners:
                runner.close()
    if run.failure is not None:
        raise SystemExit(f"{workload}, {variant}: {run.failure.reason}")
    logs = [math.log(head / base) for base, head in zip(run.base_ms, run.head_ms, strict=True)]
    middle = statistics.median(logs)
    ratio = paired_ratio(run.head_ms, run.base_ms, confidence=CONFIDENCE)
    half = math.log(ratio.high / ratio.low) / 2.0 if ratio.low > 0.0 else math.inf
    return {
        "workload": workload,
        "variant": variant,
        "pairs": len(logs),
        "median_ms": statistics.median(run.base_ms),
        "pair_mad": 1.4826 * statistics.median(abs(x - middle) for x in logs),
        "half_width": half if math.isfinite(half) else None,
        "foreign_load_cores": round(run.foreign_load_cores, 3),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return medians by workload and variant, of the rounds in which others were quiet."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row["workload"], {}).setdefault(row["variant"], []).append(row)
    return {
        workload: {variant: _middle(these) for variant, these in variants.items()}
        for workload, variants in found.items()
    }


def _middle(rows: list[dict[str, Any]]) -> dict[str, Any]:
    quiet = [row for row in rows if row["foreign_load_cores"] < guard_live.UNDISTURBED_CORES]
    if not quiet:
        return {"rounds": 0}
    middle = {name: statistics.median(row[name] or math.inf for row in quiet) for name in ("pair_mad", "half_width")}
    return {"rounds": len(quiet), **{name: x if math.isfinite(x) else None for name, x in middle.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="of sampling, each")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    path = given.output or guard_live.HERE / "results" / detect("cpu").key / "guard_turns.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for _ in range(given.rounds):
        for workload, variants in VARIANTS.items():
            for variant in variants:
                rows.append(measure(workload, variant, given.seconds))
                row = rows[-1]
                print(
                    f"{workload:9} {variant:13} {row['pairs']:4} pairs, MAD {row['pair_mad']:.1%}, half an interval "
                    f"{row['half_width'] or math.inf:.1%}, others {row['foreign_load_cores']:.2f} cores",
                    flush=True,
                )
                document = {
                    "what": __doc__.split("\n", 1)[0],
                    "device": detect("cpu").key,
                    "software": {"torch": torch.__version__, "python": platform.python_version()},
                    "confidence": CONFIDENCE,
                    "summary": summary(rows),
                    "rows": rows,
                }
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(document, allow_nan=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
