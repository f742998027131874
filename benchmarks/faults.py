"""What the validator sees: every deliberate fault, in three sizes, on eight models, alone and in company.

    python benchmarks/faults.py                      # the whole matrix; skips rows that are in the artefact already
    python benchmarks/faults.py --short              # three models, nothing compiled, nothing written
    python benchmarks/faults.py --write-docs         # regenerate the tables of docs/what-the-validator-sees.md

Rows go to benchmarks/results/<device-key>/faults.json as they finish.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tests.faults.faulty import BY_NAME, FAULTS  # noqa: E402
from tests.faults.harness import COMBINATIONS, Attempt, applies, attempts, row_of, try_out  # noqa: E402
from tests.faults.models import MODELS  # noqa: E402

from kernel_pytorch.core.types import Mode  # noqa: E402
from kernel_pytorch.hardware import detect  # noqa: E402

DOCS = ROOT / "docs" / "what-the-validator-sees.md"
BEGIN, END = "<!-- generated: python benchmarks/faults.py --write-docs -->", "<!-- end of what is generated -->"
SHORT_MODELS = ("mlp", "tagger", "convnet", "vae")
COMPILED_ON = ("mlp", "tagger", "convnet", "vae", "bert", "llama")
"""A fault is tried together with compilation on the first of these models that has something to strike."""
BFLOAT16_ON = ("mlp", "tagger", "convnet", "bert")
"""A fault is tried together with bfloat16 on each of these."""


def results_path() -> Path:
    """Return where this machine's artefact is."""
    return ROOT / "benchmarks" / "results" / detect("cpu").key / "faults.json"


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of an artefact by key."""
    return {row["key"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}


def write_rows(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Write an artefact; a reader never sees half of one."""
    document = {
        "what": "each row: one deliberate fault, in one size, on one model, alone or with real steps",
        "device": detect("cpu").key,
        "software": {"torch": torch.__version__, "python": platform.python_version()},
        "level": "standard",
        "max_error": 2e-2,
        "rows": list(rows.values()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def plan(faults: Sequence[str], models: Sequence[str], combinations: Sequence[str]) -> list[list[Attempt]]:
    """Return groups of cells; of a group with alternatives only the first model that applies is run."""
    groups: list[list[Attempt]] = []
    for combination in combinations:
        if "compile" not in combination:
            chosen = models if combination == "alone" else [m for m in models if m in BFLOAT16_ON]
            groups += [[a] for a in attempts(faults, chosen, (combination,))]
            continue
        for name in faults:
            for mode in sorted(BY_NAME[name].modes):
                for size in dict.fromkeys((BY_NAME[name].sizes[0], BY_NAME[name].sizes[-1])):
                    cells = [
                        Attempt(name, size, m, Mode(mode), combination)
                        for m in COMPILED_ON
                        if m in models and (MODELS[m].sequence or not BY_NAME[name].sequence)
                    ]
                    groups.append(cells)
    return groups


def run(groups: list[list[Attempt]], rows: dict[str, dict[str, Any]], path: Path | None, max_seconds: float) -> None:
    """Run what is not there yet, and write as it goes."""
    started = saved = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        for number, group in enumerate(groups):
            for attempt in group:
                row = rows.get(attempt.key)
                if row is None:
                    if time.monotonic() - started > max_seconds:
                        print(f"stopped after {max_seconds:.0f} s; run again to go on", file=sys.stderr)
                        break
                    memo = Path(scratch) / f"{attempt.model}-{attempt.mode.value}"
                    memo.mkdir(exist_ok=True)
                    trial = try_out(attempt, memo)
                    row = row_of(attempt, trial) if applies(trial) else {"key": attempt.key, "status": "n/a"}
                    rows[attempt.key] = {k: (repr(v) if v == float("inf") else v) for k, v in row.items()}
                    note = row.get("detected", "n/a")
                    if note is True:
                        note = "seen" if row["reason_matched"] else "SEEN FOR ANOTHER REASON"
                    print(
                        f"[{number + 1}/{len(groups)}] {attempt.key}: {'NOT SEEN' if note is False else note}"
                        f" {row.get('gate', '')} {row.get('check', '')} {row.get('detail', '')[:100]}"
                        f" ({row.get('seconds', 0)} s)",
                        file=sys.stderr,
                        flush=True,
                    )
                if row["status"] != "n/a":
                    break
            if path is not None and time.monotonic() - saved > 10:
                write_rows(path, rows)
                saved = time.monotonic()
    if path is not None:
        write_rows(path, rows)


def _cell(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "-"
    return f"{sum(r['detected'] for r in rows)}/{len(rows)}"


def _reasons(rows: list[dict[str, Any]]) -> str:
    found: dict[str, int] = {}
    for row in rows:
        if row["detected"]:
            label = f"{row['gate']}: {re.split(r'[ .[]', row['check'])[0]}" if row["gate"] else "raises"
            found[label] = found.get(label, 0) + 1
    return ", ".join(sorted(found, key=lambda k: (-found[k], k))[:3])


def smallest_seen(rows: list[dict[str, Any]], sizes: Sequence[str]) -> str:
    """Return the smallest size that was detected on every model; with `(tensor)` first to last."""
    for size in reversed(sizes):
        of_size = [r for r in rows if r["size"] == size]
        if of_size and all(r["detected"] for r in of_size):
            return size
    return "none on every model"


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Return the tables as Markdown."""
    real = [r for r in rows if r["status"] != "n/a"]
    lines = ["Each fault alone. Cells: detected / tried, over models and modes.", ""]
    lines += ["| fault | tensor | channel | element | smallest size always seen | seen by |"]
    lines += ["|---|---|---|---|---|---|"]
    for fault in FAULTS:
        own = [r for r in real if r["fault"] == fault.name and r["combination"] == "alone"]
        if own:
            cells = " | ".join(_cell([r for r in own if r["size"] == s]) for s in ("tensor", "channel", "element"))
            lines.append(f"| {fault.summary} | {cells} | {smallest_seen(own, fault.sizes)} | {_reasons(own)} |")
    lines += ["", "Together with real steps. Cells: detected / tried, over sizes, models and modes.", ""]
    lines += ["| fault | " + " | ".join(COMBINATIONS) + " |", "|---|" + "---|" * len(COMBINATIONS)]
    for fault in FAULTS:
        own = [r for r in real if r["fault"] == fault.name]
        if own:
            cells = " | ".join(_cell([r for r in own if r["combination"] == c]) for c in COMBINATIONS)
            lines.append(f"| {fault.summary} | {cells} |")
    seen = [r for r in real if r["detected"]]
    other = [r for r in seen if not r["reason_matched"]]
    matched = len(seen) - len(other)
    lines += ["", f"{len(real)} cells, {len(seen)} detected, {matched} of them for the expected reason.", ""]
    missed = [r for r in real if not r["detected"]]
    if missed:
        lines += ["What was not seen (fault, size, combination: models):", ""]
        for place in dict.fromkeys((r["fault"], r["size"], r["combination"]) for r in missed):
            where = [r for r in missed if (r["fault"], r["size"], r["combination"]) == place]
            lines.append(f"- {', '.join(place)}: " + ", ".join(f"{r['model']} ({r['mode']})" for r in where))
        lines.append("")
    if other:
        lines += ["What was rejected for another reason than the expected one:", ""]
        lines += [
            f"- {r['fault']}, {r['size']}, {r['model']}, {r['mode']}, {r['combination']}: {r['gate']}: {r['check']}"
            f" {r['detail']}".rstrip()
            for r in other
        ] + [""]
    return "\n".join(lines)


def false_alarms(document: dict[str, Any]) -> str:
    """Return the section on faithful transforms as Markdown."""
    real = [r for r in document["rows"] if r["status"] not in ("n/a", "failed")]
    lines = ["## False alarms", ""]
    lines += [f"{document['runs']} runs of faithful candidates with fresh inputs, {document['rejected']} rejected.", ""]
    lines += ["| candidate | models | runs | rejected | nearest to a budget |", "|---|---|---|---|---|"]
    for label in dict.fromkeys(r["candidate"] for r in real):
        own = [r for r in real if r["candidate"] == label]
        nearest = max((r["nearest"] or 0.0 for r in own), default=0.0)
        rejected = sum(r["status"] != "ok" for r in own)
        models = len({r["model"] for r in own})
        lines.append(f"| {label} | {models} | {len(own)} | {rejected} | {nearest:.2f} |")
    alarms = [r for r in real if r["status"] != "ok"]
    if alarms:
        lines += ["", "Rejected:", ""] + [f"- {r['key']}: {r['reason']}" for r in alarms]
    lines += ["", document["max_error"]["why"][0].upper() + document["max_error"]["why"][1:] + ".", ""]
    return "\n".join(lines)


def generated(directory: Path) -> str:
    """Return the generated part of the page from the artefacts of a directory."""
    faults = json.loads((directory / "faults.json").read_text())
    faithful = json.loads((directory / "faithful.json").read_text())
    head = f"Measured on `{faults['device']}` with torch {faults['software']['torch']}.\n\n"
    return head + tables(faults["rows"]) + "\n" + false_alarms(faithful)


def documented(text: str, part: str) -> str:
    """Return the page with its generated part replaced."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{part}\n{END}{tail}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, and exit 1 where a fault was not seen in any size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--faults", nargs="+", choices=list(BY_NAME), default=list(BY_NAME))
    parser.add_argument("--combinations", nargs="+", choices=COMBINATIONS, default=list(COMBINATIONS))
    parser.add_argument("--max-seconds", type=float, default=float("inf"))
    parser.add_argument("--redo", action="store_true", help="run the selected rows again")
    parser.add_argument("--write-docs", action="store_true", help="only regenerate the page from the artefact")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # these models are too small for more
    path = results_path()
    rows = {} if options.short else read_rows(path)
    if options.write_docs:
        DOCS.write_text(documented(DOCS.read_text(), generated(path.parent)))
        return 0
    models = [m for m in options.models if m in SHORT_MODELS] if options.short else options.models
    groups = plan(options.faults, models, ("alone",) if options.short else options.combinations)
    if options.redo:
        for key in {a.key for group in groups for a in group}:
            rows.pop(key, None)
    warnings.filterwarnings("ignore")
    run(groups, rows, None if options.short else path, options.max_seconds)
    print(tables(list(rows.values())))
    wanted = [[r for r in rows.values() if r.get("fault") == name] for name in options.faults]
    return int(any(own and not any(r["detected"] for r in own) for own in wanted))


if __name__ == "__main__":
    sys.exit(main())
