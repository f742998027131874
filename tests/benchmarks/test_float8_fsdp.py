"""FSDP2 in FP8 beside one device: what counts as the same losses, and a run of two processes on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from torch import distributed

from .loading import BENCHMARKS, load

script = load("float8_fsdp")


def test_losses_agree_within_the_tolerances() -> None:
    alone = [4.0, 2.0]
    near = script.agreement(alone, [4.02, 2.008])
    assert near == pytest.approx({"mean": 0.0045, "worst": 0.005, "agree": True})
    assert not script.agreement(alone, [4.02, 2.014])["agree"]  # 0.6 % in the mean
    assert not script.agreement([4.0] * 5, [4.0] * 4 + [4.092])["agree"]  # 2.3 % at one step
    assert not script.agreement(alone, [4.0, float("nan")])["agree"]


def test_efficiency_and_speed_are_over_the_right_times() -> None:
    losses = {"bf16 alone": [2.0], "bf16 fsdp": [2.0], "float8 alone": [2.0], "float8 fsdp gathered": [2.1]}
    times = {"bf16 alone": [9.0], "bf16 fsdp": [10.0], "float8 alone": [6.0], "float8 fsdp gathered": [8.0]}
    found = script.summarise({"losses": losses, "samples_ms": times})
    assert found["bf16 fsdp"]["efficiency"] == pytest.approx(0.9)
    assert found["float8 fsdp gathered"] == pytest.approx(
        {"mean": 0.05, "worst": 0.05, "agree": False, "ms": 8.0, "efficiency": 0.75, "over_bf16": 1.25}
    )
    assert found["float8 alone"] == pytest.approx({"ms": 6.0, "efficiency": 1.0, "over_bf16": 1.5})


@pytest.mark.slow
def test_two_processes_on_a_cpu_once(tmp_path) -> None:
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    path = tmp_path / "fsdp.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(BENCHMARKS / "float8_fsdp.py"), "--smoke", "-o", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*options: str) -> dict:
        done = subprocess.run(
            [*command, *options], capture_output=True, text=True, timeout=240, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr  # all of it: what a process says comes before the summary of torchrun
        return json.loads(path.read_text())["rows"]["2 x tensorwise_current"]

    row = run("--only", "alone,gathered")
    assert row["failed"] == {}
    assert set(row["losses"]) == {"bf16 alone", "float8 alone", "float8 fsdp gathered"} == set(row["samples_ms"])
    assert row["losses"]["float8 alone"] != row["losses"]["bf16 alone"]
    # Micro-steps alone are scaled as ranks are, and all scales are powers of two: the same but for the order of sums.
    assert row["losses"]["float8 fsdp gathered"] == pytest.approx(row["losses"]["float8 alone"], rel=1e-4)
    assert row["summary"]["float8 fsdp gathered"]["agree"]
    assert run("--only", "alone,gathered") == row
