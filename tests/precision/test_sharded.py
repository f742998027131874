"""FP8 under FSDP2, two processes on a CPU: as one process, with weights that are gathered in FP8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

import kernel_pytorch as kp
from kernel_pytorch.errors import InputsError, ModelError
from kernel_pytorch.ops.float8_cast import E4M3, float8_cast
from kernel_pytorch.precision.gathered import GatheredWeight, gathered, turned
from kernel_pytorch.precision.sharded import ShardedWeight

from .models import block

RUN = Path(__file__).with_name("sharded_run.py")


def run(how: str, recipe: str, processes: int) -> dict[str, Any]:
    command = [sys.executable, str(RUN), how, recipe]
    if processes > 1:
        if not distributed.is_available() or not distributed.is_gloo_available():
            pytest.skip("this PyTorch has no gloo")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
        command = [*torchrun, *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tensorwise_current", "tensorwise_delayed"])
def test_two_processes_are_as_one(recipe) -> None:
    alone, plain, small = (run(*case) for case in (("plain", recipe, 1), ("plain", recipe, 2), ("float8", recipe, 2)))
    # Each rank scales its own half of the batch; scales are powers of two, so that only what saturates differs.
    rel = 1e-5 if recipe == "tensorwise_current" else 5e-3
    for other in (plain, small):
        assert other["losses"] == pytest.approx(alone["losses"], rel=rel)
        assert other["sums"] == pytest.approx(alone["sums"], rel=rel, abs=1e-6)
        assert other["keys"]
    assert small["gathers"]
    assert set(small["gathers"]) == {"torch.uint8"}
    assert "changed since the scale of its cast was found" in small["stale"]


def test_a_gathered_weight_is_its_bits() -> None:
    w = torch.randn(24, 16)
    cast = float8_cast(w, E4M3)
    held = nn.Parameter(GatheredWeight(cast.row.view(torch.uint8), cast.inverse, E4M3, torch.bfloat16))
    assert held.dtype is torch.bfloat16
    whole = gathered([held])
    assert whole is not None
    assert torch.equal(whole.row.view(torch.uint8), cast.row.view(torch.uint8))
    assert torch.equal(turned(whole.row).view(torch.uint8), cast.transposed.view(torch.uint8))
    assert torch.equal(held + 0, (cast.row.float() * cast.inverse).bfloat16())
    assert gathered([w]) is None


def test_a_sharded_weight_is_its_values_for_everybody_else() -> None:
    w = torch.randn(8, 16)
    held = ShardedWeight(w, E4M3, {})
    assert torch.equal(held * 2, w * 2)
    assert isinstance(torch.chunk(held, 2)[0], ShardedWeight)
    held.mul_(3)
    assert torch.equal(held + 0, w)
    with pytest.raises(ModelError, match="changed since the scale"):
        held.fsdp_pre_all_gather(None, None, None, None, None)


def test_what_cannot_be_sharded_is_told() -> None:
    with pytest.raises(ModelError, match="no layer runs by a tensorwise recipe"):
        kp.precision.shard_weights(block("rowwise"))
    with pytest.raises(InputsError, match="no weight is sharded in FP8"):
        kp.precision.follow_weights(block("tensorwise_current"))


def test_weights_that_another_parameter_replaced_are_not_kept() -> None:
    """FSDP2 writes into parameters of its own without a new version: eager code must not keep their casts."""
    model = block("tensorwise_current")
    x = torch.randn(4, 32)
    model(x)
    replaced = nn.Parameter(model.out.weight.detach().clone())
    model.out.weight = replaced
    first = model.out(x)
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(replaced):
        replaced.mul_(-2.0)
    bias = model.out.bias
    assert torch.allclose(model.out(x) - bias, -2 * (first - bias), rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match="another parameter than when it was converted"):
        kp.precision.hold_weights(model)
