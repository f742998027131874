"""How often the history's change points are false, how often a step is found and how soon.

    python benchmarks/history_changes.py -o benchmarks/results/guard/history_changes.json [--quick]

Nothing is timed: the median times of runs are drawn from models with a CV of 1 %. `settled` is what
`kernel_pytorch.guard.history.changes` does, `otava` is Apache Otava 0.8 with its own defaults. The same seed gives the
same figures.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from otava.analysis import compute_change_points

# The function of the same name hides the module.
module = importlib.import_module("kernel_pytorch.guard.history.changes")

CV = 0.01
STEPS = (1.02, 1.03, 1.05, 1.1)
Find = Callable[[list[float]], list[int]]
Noise = Callable[[np.random.Generator, int], np.ndarray]


def independent(source: np.random.Generator, count: int) -> np.ndarray:
    return source.standard_normal(count)


def heavy_tails(source: np.random.Generator, count: int) -> np.ndarray:
    return source.standard_t(3, count) / np.sqrt(3)


def correlated(source: np.random.Generator, count: int) -> np.ndarray:
    """AR(1) with 0.5 between neighbours: machines that are slow tend to be slow tomorrow."""
    noise = np.empty(count)
    value = source.standard_normal()
    for i, innovation in enumerate(source.standard_normal(count)):
        value = 0.5 * value + np.sqrt(0.75) * innovation
        noise[i] = value
    return noise


def settled(values: list[float]) -> list[int]:
    return [point.index for point in module._settled(values)]


def otava(values: list[float]) -> list[int]:
    return [point.index for point in compute_change_points(values)[0]]


def times(noise: Noise, seed: int, count: int, step: float = 1.0, at: int | None = None) -> list[float]:
    series = 10.0 * (1 + CV * noise(np.random.default_rng(seed), count))
    series[count // 2 if at is None else at :] *= step
    return [float(v) for v in series]


def rates(find: Find, noise: Noise, count: int, repeats: int) -> dict[str, Any]:
    false = sum(bool(find(times(noise, seed, count))) for seed in range(repeats)) / repeats
    found = {
        f"{step - 1:.0%}": sum(
            any(abs(i - count // 2) <= 1 for i in find(times(noise, seed, count, step))) for seed in range(repeats)
        )
        / repeats
        for step in STEPS
    }
    return {"runs": count, "histories": repeats, "false": false, "found": found}


def delay(find: Find, noise: Noise, step: float, repeats: int, before: int = 30, most: int = 20) -> dict[str, Any]:
    waits = []
    for seed in range(repeats):
        series = times(noise, seed, before + most, step, before)
        seen = (k for k in range(1, most) if any(abs(i - before) <= 1 for i in find(series[: before + k])))
        waits.append(next(seen, most))
    return {"step": f"{step - 1:.0%}", "median": float(np.median(waits)), "p90": float(np.quantile(waits, 0.9))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="few repeats, to see that it runs")
    arguments = parser.parse_args()
    repeats = 10 if arguments.quick else 200
    rows, delays = [], []
    for noise in (independent, heavy_tails, correlated):
        for find in (settled, otava):
            who = {"noise": noise.__name__, "method": find.__name__}
            rows += [who | rates(find, noise, n, repeats if n < 200 else repeats // 3) for n in (8, 15, 30, 120, 240)]
            delays += [who | delay(find, noise, step, repeats // 8) for step in STEPS]
    result = {
        "cv": CV,
        "max_p_value": module.MAX_P_VALUE,
        "min_change": module.MIN_CHANGE,
        "software": {p: version(p) for p in ("apache-otava", "numpy", "scipy")} | {"python": platform.python_version()},
        "rates": rows,
        "delays": delays,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print("noise        method   runs  false   " + "  ".join(f"{step - 1:>4.0%}" for step in STEPS))
    for row in rows:
        found = "  ".join(f"{share:4.0%}" for share in row["found"].values())
        print(f"{row['noise']:<12} {row['method']:<8} {row['runs']:>4}  {row['false']:>5.1%}   {found}")
    print("runs until a step is found, median (p90), 30 runs before it")
    for row in delays:
        print(f"{row['noise']:<12} {row['method']:<8} {row['step']:>4}  {row['median']:.0f} ({row['p90']:.0f})")


if __name__ == "__main__":
    main()
