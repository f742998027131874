"""A short training of two blocks in FP8 under FSDP2, for `torchrun`: losses and what was gathered, as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import distributed, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import kernel_pytorch as kp
from kernel_pytorch.errors import ModelError
from kernel_pytorch.precision.sharded import ShardedWeight
from tests.precision.models import Block, batches


def main(how: str, recipe: str) -> None:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    kp.precision.convert(model, recipe, example_inputs=(torch.randn(4, 32),))
    keys, gathers = list(model.state_dict()), []
    if world > 1:
        from torch.distributed.fsdp import fully_shard

        distributed.init_process_group("gloo")
        if how == "float8":
            kp.precision.shard_weights(model)
            inner = ShardedWeight.fsdp_pre_all_gather

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
    if rank == 0:
        sums = {name: float(value.double().square().sum()) for name, value in whole.items()}
        same_keys = list(whole) == keys
        print(json.dumps({"losses": losses, "sums": sums, "gathers": gathers, "keys": same_keys, "stale": stale}))
    if world > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
