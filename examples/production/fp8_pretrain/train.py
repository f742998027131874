"""Pre-train a byte-level GPT in FP8, on one device or many: torchrun, FSDP2, weights gathered in FP8.

    torchrun --nproc-per-node 8 train.py --width 4096 --layers 32 --steps 1000
    torchrun --nproc-per-node 2 train.py --smoke         # two processes on a CPU, FP8 emulated

The text is Python's own standard library, which is on every machine that runs this. Losses are of the global batch, so
that they agree whatever the number of processes is.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import kernel_pytorch as kp

sys.path.insert(0, str(Path(__file__).parents[2]))
import gpt_train


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32, help="of all processes together")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--recipe", default="tensorwise_current", help="`none` trains without FP8")
    parser.add_argument("--checkpoint", type=Path, help="folder to save to at the end, and to go on from")
    parser.add_argument("--watch", type=Path, help="a CSV file, one of 16 steps")
    parser.add_argument("--smoke", action="store_true", help="a tiny model for a few steps")
    chosen = parser.parse_args()
    if chosen.smoke:
        chosen.width, chosen.layers, chosen.context, chosen.batch = 64, 2, 64, 8
        chosen.steps = min(chosen.steps, 8)
    return chosen


def build(chosen: argparse.Namespace, device: torch.device, world: int) -> nn.Module:
    """Return the model in FP8, sharded where there are several processes."""
    torch.manual_seed(0)
    model = gpt_train.GPT(width=chosen.width, heads=chosen.width // 32, layers=chosen.layers, context=chosen.context)
    model.to(device)
    if chosen.recipe != "none":
        kp.precision.convert(model, chosen.recipe)
    if world > 1:
        if chosen.recipe.startswith("tensorwise"):
            kp.precision.shard_weights(model)
        half = torch.bfloat16 if device.type == "cuda" else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
        for module in model.modules():
            if isinstance(module, gpt_train.Block):
                fully_shard(module, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    return model


def batch(chosen: argparse.Namespace, step: int, rank: int, world: int) -> torch.Tensor:
    """Return this process's part of the batch of a step: byte values `[rows, context + 1]`."""
    text = gpt_train.text()
    made = torch.Generator().manual_seed(step)
    at = torch.randint(len(text) - chosen.context - 1, (chosen.batch,), generator=made)
    share = chosen.batch // world
    mine = at[rank * share : (rank + 1) * share]
    return torch.stack([text[i : i + chosen.context + 1] for i in mine.tolist()]).long()


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, *, half: bool) -> torch.Tensor:
    """Do one step and return this process's loss before it, in nats a byte."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=half):
        logits = model(tokens[:, :-1])
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach().clone()


def place() -> tuple[int, int, torch.device]:
    """Return this process's number, how many there are, and its device; begin to talk to the others."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def main() -> None:
    chosen = options()
    rank, world, device = place()
    model = build(chosen, device, world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if chosen.smoke else 3e-4, weight_decay=0.1)
    in_float8 = chosen.recipe != "none"
    if in_float8 and world > 1 and chosen.recipe.startswith("tensorwise"):
        kp.precision.follow_weights(model, optimizer)
    first = load(model, optimizer, chosen, rank) if chosen.checkpoint is not None else 0
    watch = kp.precision.Monitor(model, write_to=chosen.watch if rank == 0 else None) if in_float8 else None
    for step in range(first, chosen.steps):
        loss = train_step(
            model, optimizer, batch(chosen, step, rank, world).to(device), half=device.type == "cuda" and world == 1
        )
        if watch is not None:
            watch.step()
        if world > 1:
            distributed.all_reduce(loss)
        if rank == 0:
            print(f"step {step} loss {float(loss) / world:.5f}", flush=True)
    if chosen.checkpoint is not None:
        save(model, optimizer, chosen, rank)
    if watch is not None:
        watch.close()
    if world > 1:
        distributed.destroy_process_group()


def save(model: nn.Module, optimizer: torch.optim.Optimizer, chosen: argparse.Namespace, rank: int) -> None:
    """Write the whole model and optimizer, and the scaling state of each rank."""
    whole = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    chosen.checkpoint.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        content = {"model": whole[0], "optimizer": whole[1], "step": chosen.steps}
        torch.save(content, chosen.checkpoint / "training.pt")
    if chosen.recipe != "none":
        torch.save(kp.precision.state(model), chosen.checkpoint / f"float8-{rank}.pt")


def load(model: nn.Module, optimizer: torch.optim.Optimizer, chosen: argparse.Namespace, rank: int) -> int:
    """Take up what `save` wrote, if it is there, and return the step to go on with."""
    path = chosen.checkpoint / "training.pt"
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(
        model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options
    )
    if chosen.recipe != "none":
        kp.precision.load_state(model, torch.load(chosen.checkpoint / f"float8-{rank}.pt", weights_only=True))
        if chosen.recipe.startswith("tensorwise") and distributed.is_initialized():
            kp.precision.follow_weights(model)  # the weights are others now
    return int(saved["step"])


if __name__ == "__main__":
    main()
