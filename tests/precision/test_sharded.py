"""FP8 under FSDP2, two processes on a CPU: as one process, with weights that are gathered in FP8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
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
from .sharded_run import RECIPES, train

RUN = Path(__file__).with_name("sharded_run.py")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what two processes came to, by how weights are gathered and by recipe.

    They meet at a file: neither a port that another process may take nor a launcher that tells less than the process
    itself why it failed.
    """
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    place = tmp_path_factory.mktemp("sharded")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        processes = []
        for rank in range(2):
            log = stack.enter_context((place / f"rank{rank}").open("w"))
            command = [sys.executable, str(RUN), str(place / "met"), str(rank), "2"]
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
            stack.callback(processes[-1].wait)
            stack.callback(processes[-1].kill)
        deadline = time.monotonic() + 240
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        codes = [p.poll() for p in processes]
    said = [(place / f"rank{rank}").read_text() for rank in range(2)]
    told = (
        f"rank {rank} ended with {code}:\n{text}" for rank, (code, text) in enumerate(zip(codes, said, strict=True))
    )
    assert codes == [0, 0], "\n".join(told)
    return json.loads(said[0].strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_are_as_one(recipe, sharded) -> None:
    alone = train("plain", recipe)
    plain, small = sharded[f"plain {recipe}"], sharded[f"float8 {recipe}"]
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
