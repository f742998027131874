"""What watching a training in FP8 costs: steps of a block of linear layers with and without the monitor, in turns.

    python benchmarks/float8_monitor.py -o benchmarks/results/DEVICE/float8_monitor.json

Both variants train the same block with the same recipe. A sample is `every` steps in a row, one of them counted: its
share over the other's is what a training pays. All samples are kept. Aim: less than 1 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kernel_pytorch as kp
from kernel_pytorch.backends import manager_for


class SwiGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def trained(
    args: argparse.Namespace, device: str, *, watched: bool
) -> tuple[Callable[[], None], kp.precision.Monitor | None]:
    """Return what runs `every` steps, and the monitor that watches them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(args.width, args.width), SwiGLU(args.width, args.inner)).to(device, torch.bfloat16)
    x = torch.randn(args.tokens, args.width, device=device, dtype=torch.bfloat16)
    kp.precision.convert(model, args.recipe, example_inputs=(x[:16],))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    monitor = kp.precision.Monitor(model, every=args.every) if watched else None

    def run() -> None:
        for _ in range(args.every):
            model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if monitor is not None:
                monitor.step()

    return run, monitor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--width", type=int, default=4096 if on_gpu else 256)
    parser.add_argument("--inner", type=int, default=14336 if on_gpu else 512)
    parser.add_argument("--tokens", type=int, default=16384 if on_gpu else 512)
    parser.add_argument("--every", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--recipe", default="tensorwise_delayed")
    args = parser.parse_args()
    manager, device = manager_for(), "cuda" if on_gpu else "cpu"
    runs = {name: trained(args, device, watched=name == "watched")[0] for name in ("plain", "watched")}
    for run in runs.values():
        run()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(args.rounds):
        for name in list(runs) if i % 2 else list(reversed(runs)):
            with manager.exclusive():
                samples[name].append(manager.time_ms(runs[name]))
    ratios = [b / a for a, b in zip(samples["plain"], samples["watched"], strict=True)]
    artefact: dict[str, Any] = {
        "device": manager.spec.key, "software": dict(manager.spec.software), "emulated": not on_gpu,
        "job": {k: v for k, v in vars(args).items() if k != "output"}, "samples_ms": samples,
        "cost": statistics.median(ratios) - 1.0,
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(artefact, indent=1) + "\n")
    emulated = "" if on_gpu else " (FP8 emulated: says nothing of a GPU)"
    print(f"watching one step in {args.every} costs {artefact['cost']:.2%} of a training's steps{emulated}")


if __name__ == "__main__":
    main()
