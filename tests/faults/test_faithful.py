"""Faithful transforms are not rejected: a sample of the runs of `benchmarks/faithful.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import faithful as benchmark
from kernel_pytorch.core.types import Status

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

EAGER = [r for r in benchmark.runs() if "compile" not in r.candidate.label]
SAMPLE = EAGER[:: max(1, len(EAGER) // 24)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("run", SAMPLE, ids=lambda run: run.key.replace("/", "-"))
def test_faithful_candidate_is_accepted(run):
    outcome = benchmark.try_run(run)
    cannot = ("CandidateError", "Unsupported dtype")
    if outcome.status is Status.FAILED and any(text in outcome.reason for text in cannot):
        pytest.skip(outcome.reason)
    assert outcome.status is Status.OK, outcome.reason


def test_artefact_holds_200_runs_and_none_was_rejected():
    (path,) = (ROOT / "benchmarks" / "results").glob("*/faithful.json")
    document = json.loads(path.read_text())
    judged = [r for r in document["rows"] if r["status"] not in ("n/a", "failed")]
    assert all("Unsupported dtype" in reason for reason in document["not_runnable"])
    assert document["runs"] == len(judged) >= 200
    assert [r["key"] for r in judged if r["status"] != "ok"] == []
