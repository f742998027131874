"""Short trainings of two blocks in FP8, alone or under FSDP2: losses and what was gathered.

python sharded_run.py FILE RANK WORLD     one process of a group that meets at FILE; rank 0 prints all runs as JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import kernel_pytorch as kp
from kernel_pytorch.errors import ModelError
from kernel_pytorch.precision.sharded import ShardedWeight
from tests.precision.models import Block, batches

RECIPES = ("tensorwise_current", "tensorwise_delayed")


def train(how: str, recipe: str, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Train a few steps, sharded where there are several processes, weights in FP8 where `how` says so."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    kp.precision.convert(model, recipe, example_inputs=(torch.randn(4, 32),))
    keys, gathers = list(model.state_dict()), []
    inner = ShardedWeight.fsdp_pre_all_gather
    if world > 1:
        from torch.distributed.fsdp import fully_shard

        if how == "float8":
            kp.precision.shard_weights(model)

            def noted(self: ShardedWeight, *args: object) -> object:
                out = inner(self, *args)
                gathers.extend(str(x.dtype) for x in out[0])
                return out

            # FSDP reads the number of arguments from the signature.
            ShardedWeight.fsdp_pre_all_gather = lambda self, mesh, outer_size, outer_stride, module, mp_policy: noted(
                self, mesh, outer_size, outer_stride, module, mp_policy
            )
        mesh = distributed.init_device_mesh("cpu", (world,))
        for block in model:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    if world > 1 and how == "float8":
        kp.precision.follow_weights(model, optimizer)
    losses = []
    for x, target in batches(6):
        share = len(x) // world
        mine = slice(rank * share, (rank + 1) * share)
        loss = nn.functional.mse_loss(model(x[mine]), target[mine])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        told = loss.detach()
        if world > 1:
            distributed.all_reduce(told)
        losses.append(float(told) / world)
    whole = {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value)
        for name, value in model.state_dict().items()
    }
    stale = ""
    if world > 1 and how == "float8":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2.0)
        try:
            model(batches(1)[0][0])
        except ModelError as error:
            stale = str(error)
    ShardedWeight.fsdp_pre_all_gather = inner
    sums = {name: float(value.double().square().sum()) for name, value in whole.items()}
    return {"losses": losses, "sums": sums, "gathers": gathers, "keys": list(whole) == keys, "stale": stale}


def main(file: str, rank: int, world: int) -> None:
    """Train by both recipes, with weights gathered as they are and in FP8."""
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    runs = {f"{how} {recipe}": train(how, recipe, rank, world) for recipe in RECIPES for how in ("plain", "float8")}
    if rank == 0:
        print(json.dumps(runs))
    distributed.barrier()  # a process that ends closes what the other may still read from
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
