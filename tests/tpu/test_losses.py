"""Training on a TPU runtime gives the losses of the CPU, and each bucket of lengths is compiled once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmarks" / "tpu_losses.py"
pytestmark = pytest.mark.timeout(600)
ARTEFACT = ROOT / "benchmarks" / "results" / "tpu-emulated" / "losses.json"


@pytest.fixture(scope="module")
def measured(runtime, tmp_path_factory):
    """One seed and one layer in a process of its own: both runtimes abort theirs on a fatal error."""
    output = tmp_path_factory.mktemp("losses") / "losses.json"
    command = [sys.executable, str(BENCHMARK), "--seeds", "1", "--layers", "1", "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert output.exists(), done.stderr[-3000:]
    return json.loads(output.read_text())["runtimes"][runtime.name]


def test_float32_losses_are_the_cpus(measured):
    assert {row["way"] for row in measured["fp32"]} == {"eager", "compiled"}
    for row in measured["fp32"]:
        assert row["budget"] == 1e-6
        assert row["difference"] <= row["budget"], row


def test_bfloat16_losses_are_within_twice_what_the_cpus_bfloat16_costs(measured):
    assert {row["way"] for row in measured["bf16"]} == {"parameters", "autocast"}
    for row in measured["bf16"]:
        assert 0.0 < row["difference"] <= row["budget"], row


def test_each_bucket_is_compiled_once(measured, runtime):
    for counted in measured["compilations"]:
        visits: dict[int, list[int]] = {}
        for bucket, count in zip(counted["padded"], counted["compiled"], strict=True):
            visits.setdefault(bucket, []).append(count)
        assert set(visits) == {16, 32, 64}
        programs = {counts[0] for counts in visits.values()}
        assert len(programs) == 1, visits
        assert not any(any(counts[1:]) for counts in visits.values()), visits
        if counted["work"] == "forward" or runtime.name == "torch_xla":
            assert programs == {1}


def test_the_committed_artefact_has_both_runtimes_and_nothing_wrong():
    artefact = json.loads(ARTEFACT.read_text())
    assert set(artefact["runtimes"]) == {"torch_tpu", "torch_xla"}
    assert artefact["steps"] >= 4
    for name, part in artefact["runtimes"].items():
        assert part["emulated"], name
        assert all(row["difference"] <= row["budget"] for row in part["fp32"] + part["bf16"]), name
        for counted in part["compilations"]:
            assert set(counted["padded"]) == {16, 32, 64}, name
