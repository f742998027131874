"""TorchTPU as a runtime: on the chip where there is one, else emulated on the CPU, each in a process of its own."""

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
        importlib.util.find_spec("torch_tpu") is None,
        reason="torch_tpu is not installed; `make test-tpu` builds an environment with it",
    ),
    pytest.mark.timeout(600),
]


def environment():
    """Return the environment of a child: emulated where there is no chip."""
    emulate = {} if probe.attached().reachable else {"KPT_TPU_EMULATE": "1"}
    return {**os.environ, **emulate, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


@pytest.fixture(scope="module")
def child():
    """Run a part of `torch_tpu_steps` and return what it printed."""

    def run(part):
        command = [sys.executable, "-m", "tests.tpu.torch_tpu_steps", part]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def losses(child):
    return child("losses")


def apart(losses, one, other):
    return max(abs(a - b) for a, b in zip(losses[one], losses[other], strict=True))


@pytest.mark.parametrize(
    "name", ["tpu", "tpu compiled", "tpu loss compiled", "tpu in a loop", "tpu in a loop, loss compiled"]
)
def test_float32_losses_are_those_of_the_cpu(losses, name):
    if probe.attached().reachable:
        pytest.skip("a chip multiplies float32 in bfloat16 passes by default")
    assert apart(losses, name, "cpu") <= 1e-6
    assert losses[name][0] > losses[name][-1], "it trains"


@pytest.mark.parametrize("name", ["tpu pure_bf16", "tpu autocast"])
def test_bfloat16_losses_cost_what_bfloat16_costs_on_the_cpu(losses, name):
    """The budget is twice the distance from fp64 that training in bfloat16 on the CPU has by itself."""
    budget = 2.0 * apart(losses, "cpu bfloat16", "cpu float64")
    assert 1e-4 < budget < 0.1, "the reference rounds, and still is one"
    assert 0.0 < apart(losses, name, "cpu float64") <= budget


def test_one_graph_a_bucket_is_compiled_and_none_again(child):
    found = child("buckets")
    assert all(found["bucketed"]["right"])
    assert found["bucketed"]["graphs"] == 2, "buckets of 8 and 16 for six sizes"
    assert found["bucketed"]["again"] == 0
    assert all(found["with its buckets"]["right"])
    assert found["with its buckets"]["graphs"] == 4, "1, 4, 8 and 16 rows for six sizes"
    assert found["with its buckets"]["again"] == 0
    assert all(found["each shape"]["right"])
    assert found["each shape"]["graphs"] == 3, "without buckets, one for each size"


def test_a_runtime_that_comes_after_a_backward_is_refused_with_the_order_that_works(child):
    found = child("late")
    assert "a backward has run in this process" in found["error"]
    assert "manager_for('tpu').synchronize()" in found["fix"]
