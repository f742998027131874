"""Whole searches on a TPU: on the chip where there is one, else emulated on the CPU, where times mean nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_pytorch.hardware.tpu import probe
from kernel_pytorch.hardware.tpu.installed import EMULATED

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CHIP = bool(probe.attached().reachable)

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("torch_tpu") is None,
        reason="torch_tpu is not installed; `make test-tpu` builds an environment with it",
    ),
    pytest.mark.slow,
    pytest.mark.timeout(1500),
]

PLANTED = """
import os, sys
from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.types import Candidate, Numerics, Mode, Step
from kernel_pytorch.search.jobs import Jobs
from kernel_pytorch.search.trial import TrialRequest
from tests.tpu.target import inference

class Aborts:
    name, summary, group, compiles = "aborts", "ends its process as torch_tpu does", "planted", False
    numerics, modes = Numerics.EXACT, frozenset(Mode)
    def probe(self, device): return None
    def propose(self, workload, device): return [Step(self.name)]
    def ceiling(self, step, prediction, device): return float("inf")
    def source(self, step): return ""
    def apply(self, program, step):
        assert next(program.model.parameters()).device.type == "tpu"
        os.abort()

with Jobs(inference(), KernelPyTorchConfig(budget_s=60.0), (Aborts(),), "tpu") as jobs:
    for candidate in (Candidate((Step("aborts"),)), Candidate()):
        trial = jobs.run(TrialRequest(candidate, seconds=1.0), timeout_s=400.0)
        print(trial.status, "|", trial.reason, flush=True)
print("torch_tpu" in sys.modules)
"""


def environment():
    emulate = {} if CHIP else {"KPT_TPU_EMULATE": "1"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **emulate, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONPATH": path}


def kpt(*arguments):
    command = [sys.executable, "-m", "kernel_pytorch", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1400)


def search(directory, name, mode, only):
    done = kpt(
        *("optimize", f"tests/tpu/target.py:{name}", "--device", "tpu", "--mode", mode),
        *("--budget", 1000, "--only", only, "-o", directory),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads((directory / "plan.json").read_text())


@pytest.fixture(scope="module")
def inference(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inference")
    return directory, *search(directory, "inference", "inference", "compile,dtype")


def test_the_plan_holds_what_the_compiler_says_of_its_memory(inference):
    directory, text, plan = inference
    unmodified = plan["memory"][0]
    assert unmodified["whose"] == "unmodified"
    assert unmodified["fits"] is True, unmodified["reason"]
    weights = 4 * (64 * 256 + 256 + 256 * 64 + 64)
    assert weights <= unmodified["parts"]["parameters"] <= unmodified["peak_bytes"] < unmodified["capacity_bytes"]
    assert "by the compiler for v" in " ".join(text.split())
    assert 'id="fit"' in (directory / "report.html").read_text(encoding="utf-8")


def trials(plan, transform):
    return [t for t in plan["evidence"] if any(s["transform"] == transform for s in t["candidate"]["steps"])]


def test_a_plan_says_what_it_ran_on(inference):
    _, text, plan = inference
    device = plan["device"]
    assert device["vendor"] == "tpu"
    assert device["software"]["runtime"].startswith("torch_tpu ")
    assert device["software"]["libtpu"]
    assert not device["verified"]
    if not CHIP:
        assert device["arch"] == "emulated"
        for told in (device["name"], device["software"]["runtime"], " ".join(text.split())):
            assert EMULATED in told


def test_an_inference_is_compiled_judged_and_timed(inference):
    _, _, plan = inference
    compiled = [t for t in trials(plan, "compile") if len(t["candidate"]["steps"]) == 1]
    assert {t["status"] for t in compiled} == {"ok"}
    for trial in compiled:
        assert trial["isolation"] == "process"
        assert trial["numerics"]["checks"]
        assert trial["measurement"]["samples_ms"]
    cast = trials(plan, "dtype")
    assert cast
    assert {t["status"] for t in cast} == {"ok"}, [t["reason"] for t in cast]


def test_what_is_for_other_devices_is_skipped_with_its_reason(tmp_path):
    done = kpt("detect", "--device", "tpu", "--format", "json")
    reasons = {t["name"]: t["reason"] for t in json.loads(done.stdout)["transforms"]}
    assert reasons["cuda_graph"] == "no CUDA graphs on tpu"
    assert "CPUs and GPUs" in reasons["aoti"]
    assert not reasons["compile"]


def test_a_plan_is_replayed_and_guarded(inference, tmp_path):
    """That of the compiled call, whether or not it was the fastest here."""
    _, _, plan = inference
    compiled = next(t for t in trials(plan, "compile") if len(t["candidate"]["steps"]) == 1)
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "chosen": {**compiled, "phase": "confirm"}}))
    replayed = kpt("apply", tmp_path, "tests/tpu/target.py:inference", "--format", "json")
    assert replayed.returncode in (0, 1), replayed.stderr[-3000:]  # how fast it is says nothing when emulated
    told = json.loads(replayed.stdout)
    assert told["measured"]["speedup"] > 0.0
    assert [s["transform"] for s in told["chosen"]] == ["compile"]
    checked = kpt("check", tmp_path, "--format", "json", "--history", "none", "--budget", 30)
    assert checked.returncode in (0, 1), checked.stderr[-3000:]
    assert json.loads(checked.stdout)["verdict"] in ("PASS", "FAIL", "INCONCLUSIVE")


def test_a_training_step_is_searched(tmp_path):
    _, plan = search(tmp_path / "plan", "training", "training", "compile,precision_policy")
    assert plan["workload"]["mode"] == "training"
    for transform in ("compile", "precision_policy"):
        tried = trials(plan, transform)
        assert tried
        # What takes several times the unmodified model is left, and on a busy machine that is nobody's fault.
        assert {t["status"] for t in tried} <= {"ok", "wrong", "timeout"}, [t["reason"] for t in tried]
        assert any(t["status"] == "ok" for t in tried)


def test_an_abort_is_a_failed_trial_and_the_next_one_runs():
    done = subprocess.run(
        [sys.executable, "-c", PLANTED], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second, loaded = done.stdout.splitlines()
    assert first == "failed | died by signal 6 (SIGABRT)"
    assert second.startswith("ok |")
    assert loaded == "False", "the runtime is the workers'"
