"""A whole search on PyTorch/XLA: the same five steps as on any device, in worker processes that hold the runtime."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_pytorch.hardware.tpu import probe

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("torch_xla") is None,
        reason="torch_xla is not installed; `make test-tpu` builds an environment with it",
    ),
    pytest.mark.slow,
    pytest.mark.timeout(1500),
]


def search(directory, name, mode, only):
    emulate = {} if probe.attached().reachable else {"KPT_TPU_EMULATE": "1"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-m", "kernel_pytorch", "optimize", f"tests/tpu/target.py:{name}", "--device", "tpu"]
    command += ["--mode", mode, "--budget", "1000", "--only", only, "-o", str(directory)]
    env = {**os.environ, **emulate, "PYTHONPATH": path, "KPT_TPU_RUNTIME": "torch_xla"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((directory / "plan.json").read_text())


@pytest.mark.parametrize(
    ("name", "mode", "only"),
    [("inference", "inference", "compile,dtype"), ("training", "training", "compile,precision_policy")],
)
def test_a_search_judges_and_times_its_candidates(tmp_path, name, mode, only):
    plan = search(tmp_path / "plan", name, mode, only)
    device = plan["device"]
    assert device["vendor"] == "tpu"
    assert device["software"]["runtime"].startswith("torch_xla 2.9")
    assert not device["verified"]
    unmodified = [t for t in plan["evidence"] if not t["candidate"]["steps"]]
    assert {t["status"] for t in unmodified} == {"ok"}, [t["reason"] for t in unmodified]
    tried = [t for t in plan["evidence"] if t["candidate"]["steps"]]
    for transform in only.split(","):
        assert any(step["transform"] == transform for t in tried for step in t["candidate"]["steps"]), transform
    for trial in tried:
        assert trial["isolation"] == "process"
        assert trial["numerics"]["checks"] if trial["status"] == "ok" else trial["reason"]
    compiled = [t for t in tried if any(step["transform"] == "compile" for step in t["candidate"]["steps"])]
    assert all(t["status"] == "ok" for t in compiled), [(t["status"], t["reason"]) for t in compiled]
