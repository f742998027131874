"""False alarms and power of `kernel_pytorch.validation.regression`, by noise, slowdown and number of pairs.

    python benchmarks/guard_power.py -o benchmarks/results/guard/power.json      # all of it, minutes
    python benchmarks/guard_power.py --short                                     # for CI: exit 1 on a missed promise
    python benchmarks/guard_power.py --document                                  # tables into docs/guard-statistics.md

Nothing is timed: noise comes from models and from recorded A/A series of an H100 (`guard_noise.py`), a slowdown is a
factor on the head's times. Every verdict is the library's own, notes and warm-up rule included. `INCONCLUSIVE` counts
as a miss. The same seed gives the same figures.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import re
import sys
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from guard_noise import APART, SIMULATED, Design, adjacent, noisier, read_series, resampled, unrelated, windows
from scipy.stats import beta

from kernel_pytorch.core.types import Verdict
from kernel_pytorch.validation.regression import Judgement, Sequential, judge_pairs, judge_series

ROOT = Path(__file__).parents[1]
ARTEFACT = ROOT / "benchmarks" / "results" / "guard" / "power.json"
DOCUMENT = ROOT / "docs" / "guard-statistics.md"
FALSE_ALARMS = 0.01
POWER = 0.95
SIZES = (20, 40, 80, 160, 200)
APART_SIZES = (40, 80, 150)


def recorded() -> dict[str, Design]:
    """Return designs over the recorded series, by series and how their pairs come about."""
    designs: dict[str, Design] = {}
    for name, series in read_series().items():
        for length in (10, 25, 50):
            designs[f"{name} | in turns (ABBA), blocks of {length}"] = adjacent(resampled(series, length))
            designs[f"{name} | not side by side but called so, blocks of {length}"] = unrelated(
                resampled(series, length)
            )
        designs[f"{name} | in turns (ABAB), blocks of 25"] = adjacent(resampled(series, 25), order="ABAB")
        designs[f"{name} | in turns (ABBA), as recorded"] = adjacent(windows(series))
    return designs


DESIGNS: dict[str, Design] = {
    **{f"simulated | {name}": design for name, (_, design) in SIMULATED.items()},
    **{f"recorded | {name}": design for name, design in recorded().items()},
    **{f"apart | {name}": design for name, design in APART.items()},
    **{f"apart | {name}": unrelated(resampled(series, 25)) for name, series in read_series().items()},
    "noisier | head with three times the spread": noisier,
}


@dataclass(frozen=True)
class Cell:
    """One row of the table before it is filled: a design, and what is asked of it."""

    design: str
    pairs: int
    effect: float
    max_slowdown: float
    repeats: int


def fixed(base: list[float], head: list[float], max_slowdown: float) -> Judgement:
    return judge_pairs(base, head, max_slowdown=max_slowdown)


def sequential(base: list[float], head: list[float], max_slowdown: float) -> Judgement:
    """Look after every block of two pairs, as the runner does."""
    judge = Sequential(max_slowdown, max_pairs=len(base))
    for pairs in range(2, len(base) + 1, 2):
        judged = judge.look(base[:pairs], head[:pairs], last=pairs == len(base))
        if judged is not None:
            return judged
    raise AssertionError("the last look has no judgement")


def apart(base: list[float], head: list[float], max_slowdown: float) -> Judgement:
    return judge_series(base, head, max_slowdown=max_slowdown)


METHODS = {"fixed": fixed, "sequential": sequential, "apart": apart}


def fill(cell: Cell) -> list[dict[str, Any]]:
    """Return the rows of a cell, one for each method; all methods see the same samples."""
    group, _, noise = cell.design.partition(" | ")
    methods = ("apart",) if group == "apart" else ("fixed", "sequential")
    seed = zlib.crc32(cell.design.encode())
    g = np.random.default_rng((seed, cell.pairs))
    counts = {method: collections.Counter[str]() for method in methods}
    for _ in range(cell.repeats):
        base, head = DESIGNS[cell.design](g, cell.pairs)
        head = head * (1.0 + cell.effect)
        for method in methods:
            judged = METHODS[method](base.tolist(), head.tolist(), cell.max_slowdown)
            counts[method][judged.verdict.value] += 1
            counts[method]["pairs"] += judged.pairs
            counts[method]["called noisier"] += any("noisier" in note for note in judged.notes)
    rows = []
    for method, seen in counts.items():
        row = {
            "group": group, "noise": noise, "method": method, "pairs": cell.pairs, "effect": cell.effect,
            "max_slowdown": cell.max_slowdown, "repeats": cell.repeats,
            **{verdict.value: seen[verdict.value] for verdict in (Verdict.FAIL, Verdict.PASS, Verdict.INCONCLUSIVE)},
            "fail_interval": [round(x, 5) for x in clopper_pearson(seen["FAIL"], cell.repeats)],
        }  # fmt: skip
        if method == "sequential":
            row["mean_pairs"] = round(seen["pairs"] / cell.repeats, 1)
        if group == "noisier":
            row["called_noisier"] = seen["called noisier"]
        rows.append(row)
    return rows


def clopper_pearson(hits: int, repeats: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a rate."""
    tail = (1.0 - confidence) / 2.0
    low = float(beta.ppf(tail, hits, repeats - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1.0 - tail, hits + 1, repeats - hits)) if hits < repeats else 1.0
    return low, high


def cells(*, short: bool) -> list[Cell]:
    """Return what the table consists of; the short form has the promised rows, with fewer repeats."""
    alarms, power = (120, 180) if short else (1000, 500)
    table: list[Cell] = []
    for name, (cv, _) in SIMULATED.items():
        slowdown = 0.01 if cv is not None and cv <= 0.005 else 0.03
        promised = 40 if cv is not None and cv <= 0.02 else 160
        effects = (slowdown,) if short else (slowdown / 2.0, slowdown, 2.0 * slowdown, -slowdown)
        for pairs in (promised,) if short else (20, 40, 80, 160):
            design = f"simulated | {name}"
            table.append(Cell(design, pairs, 0.0, slowdown, alarms))
            table += [Cell(design, pairs, effect, slowdown, power) for effect in effects]
    for design in DESIGNS:
        group, _, noise = design.partition(" | ")
        launch = noise.startswith("launch")
        effect, promised = (0.10, 200) if launch else (0.03, 40)
        if group == "recorded":
            table += [Cell(design, n, 0.0, 0.03, alarms) for n in ((20, promised) if short else (12, *SIZES))]
            table += [Cell(design, n, effect, 0.03, power) for n in ((promised,) if short else SIZES)]
        elif group == "apart":
            effects = (0.0,) if short else (0.0, 0.03, 0.10, 0.30)
            table += [Cell(design, n, e, 0.03, power) for n in ((80,) if short else APART_SIZES) for e in effects]
        elif group == "noisier":
            table += [Cell(design, n, 0.0, 0.03, power) for n in ((40,) if short else (40, 80, 160))]
    return table


def promises(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what is promised, what was seen, and whether it is kept."""
    kept: list[dict[str, Any]] = []

    def rate(
        name: str,
        chosen: list[dict[str, Any]],
        *,
        most: float | None = None,
        least: float | None = None,
        verdict: str = "FAIL",
    ) -> None:
        assert chosen, f"no row for the promise: {name}"
        hits, repeats = sum(r[verdict] for r in chosen), sum(r["repeats"] for r in chosen)
        worst = (max if most is not None else min)(r[verdict] / r["repeats"] for r in chosen)
        if most is not None:
            # In total, and in no cell more often than a true rate of that much would allow (one in 10,000).
            alike = all(clopper_pearson(r[verdict], r["repeats"], 0.9998)[0] <= most for r in chosen)
            ok = hits / repeats <= most and alike
        else:
            ok = worst >= (least or 0.0)
        kept.append({
            "promise": name, "verdict": verdict, "seen": hits, "repeats": repeats, "worst_row": round(worst, 5),
            "kept": ok,
        })  # fmt: skip

    by = collections.defaultdict(list)
    for row in rows:
        by[row["group"]].append(row)
    for method in ("fixed", "sequential"):
        aa = [r for r in by["recorded"] if r["effect"] == 0.0 and r["method"] == method]
        rate(f"{method}: false alarms at most 1 %, recorded series", aa, most=FALSE_ALARMS)
        aa = [r for r in by["simulated"] if r["effect"] == 0.0 and r["method"] == method]
        rate(f"{method}: false alarms at most 1 %, simulated noise", aa, most=FALSE_ALARMS)
        better = [r for r in by["simulated"] if r["effect"] < 0.0 and r["method"] == method]
        if better:
            rate(f"{method}: no improvement is called a regression", better, most=0.0)
        slow = [
            r for r in by["simulated"] + by["recorded"] if r["method"] == method and r["effect"] == r["max_slowdown"]
        ]
        rate(f"{method}: a slowdown that matters passes at most 1 %", slow, most=FALSE_ALARMS, verdict="PASS")
        noisy = [r for r in by["noisier"] if r["method"] == method]
        rate(f"{method}: no head that is only noisier is called slower", noisy, most=FALSE_ALARMS)
        for cv, slowdown, pairs in ((0.005, 0.01, 40), (0.02, 0.03, 40), (0.04, 0.03, 160)):
            chosen = [
                r for r in by["simulated"] if r["method"] == method and r["pairs"] == pairs
                and r["effect"] == r["max_slowdown"] == slowdown and SIMULATED[r["noise"]][0] == cv
            ]  # fmt: skip
            rate(f"{method}: {slowdown:.0%} found within {pairs} pairs at a CV of {cv:.1%}", chosen, least=POWER)
        for series, effect, pairs in (("training", 0.03, 40), ("launch", 0.10, 200)):
            chosen = [
                r for r in by["recorded"] if r["method"] == method and r["pairs"] == pairs and r["effect"] == effect
                and r["noise"].startswith(series) and "in turns" in r["noise"]
            ]  # fmt: skip
            rate(f"{method}: {effect:.0%} found within {pairs} pairs of the {series} series", chosen, least=POWER)
    aa = [r for r in by["apart"] if r["effect"] == 0.0]
    rate("series not taken side by side: false alarms at most 1 %", aa, most=FALSE_ALARMS)
    return kept


def table(rows: list[dict[str, Any]], *, short: bool = False) -> dict[str, Any]:
    """Return the artefact."""
    return {
        "what": "verdicts of kernel_pytorch.validation.regression over simulated and recorded noise; nothing is timed",
        "recorded": json.loads((ROOT / "benchmarks/data/h100_aa_samples.json").read_text(encoding="utf-8"))["meta"],
        "short": short,
        "promises": promises(rows),
        "rows": rows,
        "environment": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
    }


def percent(hits: int, repeats: int) -> str:
    return f"{100.0 * hits / repeats:.1f}" if 0 < hits < repeats else f"{100 * hits // repeats}"


def lines(header: tuple[str, ...], body: list[tuple[str, ...]]) -> str:
    rows = [header, tuple("---" if i == 0 else "---:" for i in range(len(header))), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def documents(artefact: dict[str, Any]) -> dict[str, str]:
    """Return the tables of the document by the name of their marker."""
    rows = artefact["rows"]
    tables = {
        "promises": lines(
            ("promise", "verdict", "seen", "of", "worst row", "kept"),
            [
                (p["promise"], f"`{p['verdict']}`", f"{p['seen']:,}", f"{p['repeats']:,}",
                 f"{100 * p['worst_row']:.1f} %", "yes" if p["kept"] else "**no**")
                for p in artefact["promises"]
            ],
        )
    }  # fmt: skip

    def cell(group: str, noise: str, method: str, pairs: int, effect: float, slowdown: float) -> str:
        for r in rows:
            if (r["group"], r["noise"], r["method"], r["pairs"]) == (group, noise, method, pairs) and (
                (r["effect"], r["max_slowdown"]) == (effect, slowdown)
            ):
                return percent(r["FAIL"], r["repeats"])
        return ""

    sizes = (20, 40, 80, 160)
    for method in ("fixed", "sequential"):
        body = []
        for noise, (cv, _) in SIMULATED.items():
            d = 0.01 if cv is not None and cv <= 0.005 else 0.03
            for effect in (0.0, d / 2.0, d, 2.0 * d):
                found = [cell("simulated", noise, method, n, effect, d) for n in sizes]
                body.append((noise, f"{100 * d:.0f} %", f"{100 * effect:.1f} %", *found))
        header = ("noise of one sample", "`max_slowdown`", "true slowdown", *(f"{n} pairs" for n in sizes))
        tables[f"simulated {method}"] = lines(header, body)
    wide = (12, *SIZES)
    body = []
    for method in ("fixed", "sequential"):
        for design in DESIGNS:
            group, _, noise = design.partition(" | ")
            if group != "recorded":
                continue
            effect = 0.10 if noise.startswith("launch") else 0.03
            for e in (0.0, effect):
                found = [cell(group, noise, method, n, e, 0.03) for n in wide]
                body.append((noise.replace(" | ", ": "), method, f"{100 * e:.0f} %", *found))
    tables["recorded"] = lines(("series", "method", "true slowdown", *(f"{n} pairs" for n in wide)), body)
    body = []
    for noise in dict.fromkeys(r["noise"] for r in rows if r["group"] == "apart"):
        for effect in (0.0, 0.03, 0.10, 0.30):
            found = [cell("apart", noise, "apart", n, effect, 0.03) for n in APART_SIZES]
            body.append((noise, f"{100 * effect:.0f} %", *found))
    tables["apart"] = lines(("what moves", "true slowdown", *(f"{n} samples" for n in APART_SIZES)), body)
    stops = []
    for noise in SIMULATED:
        mine = [r for r in rows if r["noise"] == noise and r["method"] == "sequential" and r["pairs"] == 160]
        if mine:
            by = {r["effect"]: f"{r['mean_pairs']:.0f}" for r in mine}
            d = mine[0]["max_slowdown"]
            stops.append((noise, f"{100 * d:.0f} %", *(by[e] for e in (0.0, d, 2.0 * d, -d))))
    header = ("noise of one sample", "`max_slowdown`", "unchanged", "slower by it", "by twice it", "faster by it")
    tables["stops"] = lines(header, stops)
    noisier_rows = [
        (str(r["pairs"]), r["method"], *(percent(r[k], r["repeats"]) for k in ("FAIL", "PASS", "called_noisier")))
        for r in rows
        if r["group"] == "noisier"
    ]
    tables["noisier"] = lines(("pairs", "method", "FAIL, %", "PASS, %", "called noisier, %"), noisier_rows)
    return tables


def rendered(document: str, artefact: dict[str, Any]) -> str:
    """Return the document with its tables made anew."""
    for name, text in documents(artefact).items():
        marked = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)", flags=re.DOTALL)
        document, count = marked.subn(lambda m, text=text: f"{m[1]}\n{text}\n\n{m[2]}", document)
        if count != 1:
            raise SystemExit(f"{DOCUMENT} has {count} places for the table {name!r}")
    return document


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--short", action="store_true", help="the promised rows with fewer repeats")
    parser.add_argument("--document", action="store_true", help=f"write the tables of {ARTEFACT} into {DOCUMENT}")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.document:
        artefact = json.loads(ARTEFACT.read_text(encoding="utf-8"))
        DOCUMENT.write_text(rendered(DOCUMENT.read_text(encoding="utf-8"), artefact), encoding="utf-8")
        print(f"wrote the tables of {DOCUMENT}")
        return 0
    began = time.monotonic()
    wanted = cells(short=options.short)
    costly = sorted(range(len(wanted)), key=lambda i: -wanted[i].repeats * wanted[i].pairs)
    with ProcessPoolExecutor(options.processes) as pool:
        done = dict(zip(costly, pool.map(fill, [wanted[i] for i in costly]), strict=True))
    artefact = table([row for i in range(len(wanted)) for row in done[i]], short=options.short)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(artefact, indent=1)
        text = re.sub(r"\n   +", " ", text).replace("\n  }", " }")  # a row a line
        options.output.write_text(text + "\n", encoding="utf-8")
    for p in artefact["promises"]:
        seen = f"{p['seen']} {p['verdict']} of {p['repeats']}, worst row {100 * p['worst_row']:.1f} %"
        print(f"{'kept  ' if p['kept'] else 'MISSED'} {p['promise']}: {seen}")
    print(f"{sum(r['repeats'] for r in artefact['rows'])} verdicts in {time.monotonic() - began:.0f} s")
    return 0 if all(p["kept"] for p in artefact["promises"]) else 1


if __name__ == "__main__":
    sys.exit(main())
