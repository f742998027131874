"""FSDP2 in FP8 beside FSDP2 in bf16 and beside one GPU: the same losses, step times in turns, scaling efficiency.

    torchrun --nproc-per-node 2 benchmarks/float8_fsdp.py -o benchmarks/results/DEVICE/float8_fsdp.json
    torchrun --nproc-per-node 2 benchmarks/float8_fsdp.py -o FILE --smoke    # two processes on a CPU, FP8 emulated

The byte GPT of `examples/gpt_train.py` on the standard library's source. `alone` is one GPU, under FSDP2's mixed
precision but sharded over nobody: for losses it takes the parts of all processes as micro-steps of one batch, for times
one part, as each process of the others does (all GPUs run it at once). `float8 fsdp` gathers weights in bf16,
`float8 fsdp gathered` in FP8 (`shard_weights`).

Losses agree with one GPU where their relative differences are under half a percent in the mean and two percent at any
step. Scaling efficiency is the time of a step alone over that with FSDP, at as many tokens a GPU. Run it with 1, 2, 4
and 8 processes and one file: each number has a row of its own. What the file has is not run again.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import kernel_pytorch as kp
from kernel_pytorch.backends import manager_for

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MEAN_TOLERANCE, WORST_TOLERANCE = 0.005, 0.02
VARIANTS = ("bf16 alone", "bf16 fsdp", "float8 alone", "float8 fsdp", "float8 fsdp gathered")


def example(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pretrain = example("float8_pretrain", EXAMPLES / "production" / "fp8_pretrain" / "train.py")
gpt_train = pretrain.gpt_train


@cache
def mesh(kind: str) -> DeviceMesh:
    """Return all processes, and each for itself."""
    return init_device_mesh(kind, (distributed.get_world_size(), 1), mesh_dim_names=("all", "nobody"))


class Trainer:
    """One variant: a model, its optimizer, and steps.

    Args:
        args: The command line's.
        variant: Of `VARIANTS`.
        place: This process's number, how many there are, its device.
    """

    def __init__(self, args: argparse.Namespace, variant: str, place: tuple[int, int, torch.device]) -> None:
        self.args, (self.rank, self.world, self.device) = args, place
        self.alone, gathered = variant.endswith("alone"), variant.endswith("gathered")
        torch.manual_seed(0)
        with self.device:
            self.model = gpt_train.GPT(args.width, max(1, args.width // 128), args.layers, args.context)
        if variant.startswith("float8"):
            kp.precision.convert(self.model, args.recipe)
        if gathered:
            kp.precision.shard_weights(self.model)
        if args.compile:
            # Blocks and variants share a code object; what exceeds the limit would run uncompiled.
            torch._dynamo.config.recompile_limit = 128
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            for block in self.model.blocks:
                block.forward = torch.compile(block.forward)
        half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if self.device.type == "cuda" else {}
        among = mesh(self.device.type)["nobody" if self.alone else "all"]
        for module in (*self.model.blocks, self.model):
            fully_shard(
                module, mesh=among, mp_policy=MixedPrecisionPolicy(**half),
                reshard_after_forward=False if self.alone else None,
            )  # fmt: skip
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        if gathered:
            kp.precision.follow_weights(self.model, self.optimizer)

    def step(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Do one step on parts of a batch, one after the other, and return their mean loss."""
        told = []
        for tokens in parts:
            logits = self.model(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()) / len(parts)
            loss.backward()
            told.append(loss.detach())
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(told).sum()

    def part(self, step: int, rank: int) -> torch.Tensor:
        """Return one process's part of the batch of a step."""
        chosen = argparse.Namespace(context=self.args.context, batch=self.args.batch * self.world)
        made: torch.Tensor = pretrain.batch(chosen, step, rank, self.world)
        return made.to(self.device)

    def losses(self, steps: int) -> list[float]:
        """Train on global batches and return the losses of those."""
        told = []
        for step in range(steps):
            ranks = range(self.world) if self.alone else [self.rank]
            loss = self.step([self.part(step, rank) for rank in ranks])
            if not self.alone:
                distributed.all_reduce(loss)
                loss = loss / self.world
            told.append(loss)
        return [float(loss) for loss in told]


def begin() -> tuple[int, int, torch.device]:
    """Return this process's number, how many there are, and its device; begin to talk to the others.

    Raises:
        SystemExit: It was not started by torchrun.
    """
    if "RANK" not in os.environ:
        raise SystemExit("start it with torchrun, also for one process")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return distributed.get_rank(), distributed.get_world_size(), device


def slowest(value: float, device: torch.device) -> float:
    """Return the largest of all processes' values."""
    told = torch.tensor(value, device=device, dtype=torch.float64)
    distributed.all_reduce(told, op=distributed.ReduceOp.MAX)
    return float(told)


def in_turns(
    steps: dict[str, Callable[[], Any]], args: argparse.Namespace, device: torch.device
) -> dict[str, list[float]]:
    """Return milliseconds of a step by variant, of the slowest process, forwards and backwards in turn."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(args.rounds + 1):
        for name in list(steps) if i % 2 else list(reversed(steps)):
            distributed.barrier()
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(args.inner):
                steps[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            took = slowest(1e3 * (time.perf_counter() - start) / args.inner, device)
            if i:
                samples[name].append(took)
    return samples


def agreement(alone: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Return how far losses are from those of one GPU, relative, and whether that is within the tolerances."""
    off = [abs(b - a) / a for a, b in zip(alone, other, strict=True)]
    mean, worst = statistics.mean(off), max(off)
    agree = mean <= MEAN_TOLERANCE and worst <= WORST_TOLERANCE  # NaN is below nothing
    return {"mean": mean, "worst": worst, "agree": agree and all(map(math.isfinite, off))}


def summarise(row: dict[str, Any]) -> dict[str, Any]:
    """Return by variant with FSDP: agreement with one GPU of its format, times, speed-ups, efficiency."""
    medians = {name: statistics.median(samples) for name, samples in row.get("samples_ms", {}).items()}
    told: dict[str, Any] = {}
    for name in VARIANTS:
        kind = name.split()[0]
        found: dict[str, Any] = {}
        if not name.endswith("alone") and {name, f"{kind} alone"} <= set(row["losses"]):
            found |= agreement(row["losses"][f"{kind} alone"], row["losses"][name])
        if name in medians:
            found["ms"] = medians[name]
            if f"{kind} alone" in medians:
                found["efficiency"] = medians[f"{kind} alone"] / medians[name]
            base = "bf16 alone" if name.endswith("alone") else "bf16 fsdp"
            if base in medians:
                found["over_bf16"] = medians[base] / medians[name]
        if found:
            told[name] = found
    return told


def show(name: str, row: dict[str, Any]) -> None:
    for variant, found in row["summary"].items():
        line = f"{name:24s} {variant:22s}"
        if "ms" in found:
            line += f" {found['ms']:8.2f} ms  {found.get('over_bf16', 1.0):5.2f}x bf16"
            line += f"  {found.get('efficiency', 1.0):4.0%} of one GPU's speed a GPU"
        if "agree" in found:
            verdict = "agree" if found["agree"] else "DIFFER"
            line += f"  losses {verdict}: {found['mean']:.2%} in the mean, {found['worst']:.2%} at most"
        print(line)
    for variant, why in row["failed"].items():
        print(f"{name:24s} {variant:22s} failed: {why}")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8, help="sequences of each process")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--inner", type=int, default=3, help="steps of a sample")
    parser.add_argument("--recipe", default="tensorwise_current")
    parser.add_argument("--only", default="", help="variants whose name contains one of these, by commas")
    parser.add_argument("--compile", action="store_true", help="compile each block")
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds after which nothing is begun")
    parser.add_argument("--smoke", action="store_true", help="a tiny model for a few steps")
    args = parser.parse_args()
    if args.smoke:
        args.width, args.layers, args.context, args.batch = 64, 2, 64, 2
        args.steps, args.rounds, args.inner, args.rate = min(args.steps, 4), 1, 1, 1e-3
    return args


def run(
    args: argparse.Namespace, place: tuple[int, int, torch.device], row: dict[str, Any], save: Callable[[], None]
) -> None:
    """Fill a row: losses by variant, then times in turns; all processes do the same."""
    began, (_, world, device) = time.monotonic(), place
    wanted = [part for part in args.only.split(",") if part]
    names = [name for name in VARIANTS if not wanted or any(part in name for part in wanted)]
    names = [name for name in names if world > 1 or name.endswith("alone")]
    late = lambda: slowest(float(time.monotonic() - began > args.deadline), device) > 0  # noqa: E731
    steps: dict[str, Callable[[], Any]] = {}
    if all(name in row["losses"] for name in names) and set(names) <= set(row.get("samples_ms", {})):
        return
    for name in names:
        if late():
            return
        try:
            trainer = Trainer(args, name, place)
            if name not in row["losses"]:
                row["losses"][name] = trainer.losses(args.steps)
                row["failed"].pop(name, None)
                save()
            mine = trainer.part(0, place[0])
            trainer.step([mine])
            steps[name] = lambda trainer=trainer, mine=mine: trainer.step([mine])
        except (RuntimeError, ValueError, TypeError, AttributeError) as failure:  # alike in all processes
            row["failed"][name] = f"{type(failure).__name__}: {failure}"[:600]
            save()
            gc.collect()
    if not late():
        row["samples_ms"] = in_turns(steps, args, device)
        save()


def main() -> None:
    args = options()
    place = begin()
    rank, world, _ = place
    spec = manager_for().spec
    job = {key: getattr(args, key) for key in ("width", "layers", "context", "batch", "steps", "rate")}
    artefact: dict[str, Any] = {
        "device": spec.key, "gpu": spec.name, "software": dict(spec.software),
        "emulated": not torch.cuda.is_available(), "job": job, "rows": {},
        "tolerance": {"mean": MEAN_TOLERANCE, "worst": WORST_TOLERANCE},
    }  # fmt: skip
    if args.output.exists():
        known = json.loads(args.output.read_text())
        if known["job"] != job:
            raise SystemExit(f"{args.output} is of another job: {known['job']}, not {job}")
        artefact["rows"] = known["rows"]
    name = f"{world} x {args.recipe}{' compiled' if args.compile else ''}"
    row = artefact["rows"].setdefault(name, {"processes": world, "losses": {}, "failed": {}})

    def save() -> None:
        row["summary"] = summarise(row)
        if rank == 0:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(artefact, indent=1) + "\n")

    distributed.barrier()  # everybody has read the file
    run(args, place, row, save)
    if rank == 0:
        save()
        show(name, row)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
