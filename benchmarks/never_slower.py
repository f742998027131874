"""How often a search keeps the unmodified model where nothing helps, and how often it finds a planted 5 % win.

Every candidate of the first kind of search is the identity: all that is measured is noise, and a changed model
would be a false claim. In the second kind one candidate among them leaves out 1 of 20 equal parts of the work.

    python benchmarks/never_slower.py -o benchmarks/results/DEVICE/never_slower.json

The work runs on one thread: it is the search that is tested. Resumable: finished searches in the output file are
not run again. `--load` runs a competing process that comes and goes beside every search.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import queue
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kernel_pytorch import KernelPyTorchConfig, UnifiedManager, Workload
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import Mode, Numerics, Step
from kernel_pytorch.hardware import detect

PARTS = 20


class Repeated(nn.Module):
    """`parts` equal matrix products, of which the result needs one: work that can be left out without an effect."""

    def __init__(self, parts: int = PARTS, width: int = 192) -> None:
        super().__init__()
        self.parts = parts
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.parts):
            y = x @ self.weight
        return y


@dataclass(frozen=True)
class Planted:
    """A step that runs `parts` of the work; with all of them it is the identity."""

    name: str
    parts: int = PARTS
    summary: str = "planted"
    numerics: Numerics = Numerics.EXACT
    modes: frozenset = frozenset(Mode)
    compiles: bool = False

    @property
    def group(self) -> str:
        return self.name

    def probe(self, device) -> None:
        return None

    def propose(self, workload, device):
        return (Step(self.name),)

    def ceiling(self, step, prediction, device) -> float:
        return float("inf")

    def apply(self, program: Program, step: Step) -> Program:
        program.model.parts = min(self.parts, program.model.parts)
        return program

    def source(self, step: Step) -> str:
        return f"model.parts = {self.parts}"


def make_inputs(seed: int) -> torch.Tensor:
    return torch.randn(512, 192, generator=torch.Generator().manual_seed(seed))


def one_search(transforms: tuple, seed: int, budget_s: float, isolation: str) -> dict:
    config = KernelPyTorchConfig(budget_s=budget_s, seed=seed, isolation=isolation)
    started = time.monotonic()
    plan = UnifiedManager(config, transforms).optimize(Workload(Repeated, make_inputs, name="repeated")).plan
    ratio = plan.chosen.measurement.ratio if plan.chosen.measurement else None
    return {
        "seed": seed,
        "chosen": plan.candidate.label,
        "ratio": None if ratio is None else [ratio.value, ratio.low, ratio.high],
        "trials": len(plan.evidence),
        "seconds": time.monotonic() - started,
    }


def competitor(stop) -> None:
    """Load one core for a while, rest, and again."""
    torch.set_num_threads(1)
    x = torch.randn(256, 256)
    while not stop.is_set():
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            x @ x
        stop.wait(2.5)


def kinds() -> dict[str, tuple]:
    identities = tuple(Planted(f"identity_{i}") for i in range(3))
    return {"identity": identities, "planted": (identities[0], Planted("planted", PARTS - 1), identities[1])}


def in_a_process(kind: str, seed: int, args: argparse.Namespace, slots: queue.Queue[str]) -> dict:
    """Run one search in a process of its own, on cores of its own where several run at a time."""
    cores = slots.get()
    try:
        command = [sys.executable, __file__, "-o", str(args.output), "--one", kind, str(seed)]
        command += ["--budget", str(args.budget), "--isolation", args.isolation]
        pinned = ["taskset", "--cpu-list", cores, *command] if cores else command
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(pinned, capture_output=True, text=True, check=False, env=alone)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return json.loads(done.stdout.splitlines()[-1])
    finally:
        slots.put(cores)


def summary(searches: dict[str, list], args: argparse.Namespace, cores: int) -> dict:
    identity, planted = searches["identity"], searches["planted"]
    return {
        "device": detect().key,
        "identity_searches": len(identity),
        "identity_kept": sum(r["chosen"] == "unmodified" for r in identity),
        "planted_searches": len(planted),
        "planted_found": sum("planted" in r["chosen"] for r in planted),
        "planted_ratio": PARTS / (PARTS - 1),
        "candidates_tried": sum(r["trials"] for r in (*identity, *planted)),
        "competing_load": args.load,
        "budget_s": args.budget,
        "searches_at_a_time": args.jobs,
        "cores_a_search": cores,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("-n", "--searches", type=int, default=50, help="of each kind")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds a search")
    parser.add_argument("--isolation", choices=("process", "none"), default="none")
    parser.add_argument("--load", action="store_true", help="with a competing process that comes and goes")
    parser.add_argument("--jobs", type=int, default=1, help="searches at a time, each on its share of the cores")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "SEED"), help="run one search and print its row")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_search(kinds()[args.one[0]], int(args.one[1]), args.budget, args.isolation)))
        return
    done = json.loads(args.output.read_text()) if args.output.exists() else {"searches": {k: [] for k in kinds()}}
    stop = multiprocessing.get_context("spawn").Event()
    if args.load:
        multiprocessing.get_context("spawn").Process(target=competitor, args=(stop,), daemon=True).start()
    slots: queue.Queue[str] = queue.Queue()
    share = max(1, (os.cpu_count() or 1) // args.jobs)
    for i in range(args.jobs):
        slots.put(f"{i * share}-{(i + 1) * share - 1}" if args.jobs > 1 else "")
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        pending = {}
        for seed in range(args.searches):
            for kind in kinds():
                if all(r["seed"] != seed for r in done["searches"][kind]):
                    pending[pool.submit(in_a_process, kind, seed, args, slots)] = kind
        for future in concurrent.futures.as_completed(pending):
            done["searches"][pending[future]].append(future.result())
            print(pending[future], future.result(), flush=True)
            done["summary"] = summary(done["searches"], args, share)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(done, indent=1) + "\n")
    stop.set()
    print(json.dumps(done["summary"], indent=1))


if __name__ == "__main__":
    main()
