"""Train on TPUs: ask the compiler whether the step fits, train, save, resume; one process a chip.

    python examples/production/tpu_training/train.py --size base --fit v5e:1              # one chip
    examples/production/tpu_training/launch.sh --size base --checkpoint FILE              # each host of a slice
    KPT_TPU_EMULATE=1 python examples/production/tpu_training/train.py --smoke            # TorchTPU without a chip

Without a TPU, and without its emulation being asked for, it trains on the CPU and says so. The loop is plain PyTorch:
a plan changes two lines of it. Processes hold whole copies of the model and average their gradients.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

import kernel_pytorch as kp
from kernel_pytorch.core.protocols import HardwareManager

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import byte_gpt  # noqa: E402
import gpt_train  # noqa: E402

DOES_NOT_FIT = 1
"""Exit code of `kpt fit` for a step that the compiler refuses; above it, nothing could be asked."""


def tell(*words: object) -> None:
    """Print on the first process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(*words, flush=True)


def open_device(wanted: str) -> HardwareManager:
    """Return the manager of a TPU, or of its emulation where `KPT_TPU_EMULATE=1` asks for it; else of the CPU, loudly.

    Raises:
        kernel_pytorch.KptError: `tpu` is wanted and there is none.
    """
    if wanted != "cpu":
        try:
            manager = kp.UnifiedManager(device="tpu").hardware_manager
        except kp.KptError as error:
            if wanted == "tpu" or os.environ.get("KPT_TPU_EMULATE") == "1":
                raise
            tell(f"NOTE: {error}; {error.fix}")
            tell("NOTE: training on the CPU, which shows that this runs and nothing of how fast a TPU is")
        else:
            tell(f"device: {manager.spec.name}, {manager.spec.software['runtime']}")
            return manager
    manager = kp.UnifiedManager(device="cpu").hardware_manager
    tell(f"device: {manager.spec.name}")
    return manager


def fits(size: str, topology: str) -> bool:
    """Ask the TPU's compiler whether the step of one process fits, and print its answer; needs no TPU.

    Where nobody can be asked (no compiler is installed), that is said, and training may begin.
    """
    target = f"{HERE / 'byte_gpt.py'}:{size}"
    command = [sys.executable, "-m", "kernel_pytorch", "fit", target, "--topology", topology, "--mode", "training"]
    done = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, check=False)
    if done.returncode not in (0, DOES_NOT_FIT):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        tell(f"NOTE: not asked whether it fits {topology}: {last}")
        return True
    answer = json.loads(done.stdout)
    tell(f"fit: {answer['headline']}")
    if answer["message"]:
        tell(f"the compiler: {answer['message']}")
    return done.returncode == 0


def average(network: nn.Module) -> None:
    """Average the gradients of all processes, in one exchange."""
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def save(path: Path, network: nn.Module, stepper: torch.optim.Optimizer, step: int) -> None:
    """Write a checkpoint on the CPU's side, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": network.state_dict(), "optimizer": stepper.state_dict(), "step": step}
    scratch = path.with_suffix(".writing")
    torch.save(to_cpu(state), scratch)
    scratch.replace(path)


def to_cpu(tree: Any) -> Any:
    """Return a tree of dicts and lists with its tensors on the CPU."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().cpu()
    if isinstance(tree, dict):
        return {key: to_cpu(value) for key, value in tree.items()}
    return [to_cpu(value) for value in tree] if isinstance(tree, list) else tree


def train(
    manager: HardwareManager, size: byte_gpt.Size, steps: int, *, plan: str = "", checkpoint: Path | None = None
) -> list[float]:
    """Train up to `steps` steps, from the checkpoint where there is one, and return the losses in nats.

    Each process draws batches of its own; the losses are this process's.
    """
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    network = manager.place(byte_gpt.model(size))
    stepper = gpt_train.optimizer(network.parameters())
    if plan:
        network, stepper = kp.prepare(network, stepper, plan=plan)
    first = 0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        network.load_state_dict(state["model"])
        stepper.load_state_dict(state["optimizer"])
        first = state["step"]
        tell(f"resumed at step {first}")
    losses = []
    for step in range(first, steps):
        batch = manager.place(byte_gpt.batch(step * processes + rank, size))
        stepper.zero_grad(set_to_none=True)
        value = gpt_train.loss(network, batch)
        value.backward()
        if processes > 1:
            average(network)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        stepper.step()
        losses.append(value.detach())  # not read here: reading one waits for the device
        last = step + 1 == steps
        if checkpoint is not None and rank == 0 and (last or (step + 1) % 100 == 0):
            save(checkpoint, network, stepper, step + 1)
    manager.synchronize()
    return [loss.item() for loss in losses]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps of the small size")
    parser.add_argument("--size", choices=byte_gpt.SIZES, default="small")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--device", choices=("auto", "tpu", "cpu"), default="auto")
    parser.add_argument("--fit", default="", metavar="TOPOLOGY", help="ask first whether a process's step fits: v5e:1")
    parser.add_argument("--plan", default="", help="directory of a plan made with --mode training --device tpu")
    parser.add_argument("--checkpoint", type=Path, help="file that is written every 100 steps, and resumed from")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Train and print the loss at the start and at the end, in bits a byte; returns 1 where the step does not fit."""
    arguments = parse(argv)
    size, steps = ("small", 8) if arguments.smoke else (arguments.size, arguments.steps)
    topology = arguments.fit or ("v5e:1" if arguments.smoke else "")
    if topology and int(os.environ.get("RANK", "0")) == 0 and not fits(size, topology):
        return DOES_NOT_FIT
    manager = open_device(arguments.device)
    if "RANK" in os.environ:
        distributed.init_process_group("tpu_dist" if manager.vendor == "tpu" else "gloo")
    started = time.monotonic()
    losses = train(manager, byte_gpt.SIZES[size], steps, plan=arguments.plan, checkpoint=arguments.checkpoint)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    if not losses:
        tell(f"nothing to do: the checkpoint is at step {steps} already")
        return 0
    tell(f"bits a byte: {losses[0] / math.log(2):.3f} -> {losses[-1] / math.log(2):.3f}")
    tell(f"{len(losses)} steps in {time.monotonic() - started:.1f} s, compilation and saving included")
    return 0


if __name__ == "__main__":
    sys.exit(main())
