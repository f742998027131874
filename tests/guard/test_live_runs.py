"""The live runs of the guard: what they committed, the document that shows it, and that they can be run here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "guard_live.py"
ARTEFACTS = sorted((BENCHMARK.parent / "results").glob("*/guard_live.json"))


@pytest.fixture(scope="module")
def live() -> ModuleType:
    spec = importlib.util.spec_from_file_location("guard_live", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["guard_live"] = module  # its dataclasses look it up
    spec.loader.exec_module(module)
    return module


def row(verdict: str, **changed: Any) -> dict[str, Any]:
    made = {"condition": "quiet", "workload": "launches", "slowdown_percent": 0, "verdict": verdict, "pairs": 20}
    return {**made, "seconds": 5.0, "foreign_load_cores": 0.0, **changed}


def test_what_is_not_decided_counts_as_a_run_without_a_find(live: ModuleType) -> None:
    rows = [row(v, slowdown_percent=10) for v in ("FAIL", "FAIL", "INCONCLUSIVE", "PASS")]
    first = live.summary(rows)[0]
    assert (first["runs"], first["fail"], first["pass"], first["inconclusive"]) == (4, 2, 1, 1)
    assert first["rate_of_fail"] == 0.5
    assert first["interval"][0] < 0.5 < first["interval"][1]


def test_runs_that_others_disturbed_are_counted_as_quiet_but_not_as_undisturbed(live: ModuleType) -> None:
    found = live.summary([row("PASS"), row("FAIL", foreign_load_cores=0.8), row("PASS", condition="load")])
    runs = {(s["condition"], s["workload"]): (s["runs"], s["fail"]) for s in found}
    assert runs["quiet", "all"] == (2, 1)
    assert runs["undisturbed", "all"] == (1, 0)
    assert runs["load", "launches"] == (1, 0)


@pytest.mark.parametrize("path", ARTEFACTS, ids=lambda path: path.parent.name)
def test_the_committed_summary_is_of_the_committed_rows(live: ModuleType, path: Path) -> None:
    artefact = json.loads(path.read_text(encoding="utf-8"))
    assert artefact["summary"] == live.summary(artefact["rows"])
    keys = [one["key"] for one in artefact["rows"]]
    assert len({*keys}) == len(keys)


def test_the_document_shows_the_committed_runs(live: ModuleType) -> None:
    document = live.DOCUMENT.read_text(encoding="utf-8")
    assert live.rendered(document) == document, "run: python benchmarks/guard_live.py --document"


def test_a_run_is_kept_and_not_repeated_and_none_begins_after_the_deadline(live: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "live.json"
    asked = ["--workload", "launches", "--conditions", "quiet", "--seconds", "1", "-o", str(path)]
    for more in (["--only", "aa", "--runs", "1"], ["--only", "all", "--runs", "2", "--deadline", "0"]):
        done = subprocess.run(
            [sys.executable, str(BENCHMARK), *asked, *more], check=True, capture_output=True, text=True, timeout=120
        )
    assert "the deadline ended it" in done.stdout
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [one["key"] for one in kept] == ["quiet/launches/0/0"]
    assert kept[0]["verdict"] in ("PASS", "INCONCLUSIVE", "FAIL")
    assert len(kept[0]["base_ms"]) == kept[0]["pairs"] >= 2
    assert kept[0]["workload"] in live.WORKLOADS["cpu"]
