"""Transforms that do one thing to a search, for its tests."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass

import torch
from torch import nn

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import Mode, Numerics, Step


class Sleepy(nn.Module):
    """Takes `delay_ms` beside a small product; a step may shorten the delay without changing the result."""

    def __init__(self, delay_ms: float = 4.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(16, 16)
        self.delay_ms = delay_ms

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.delay_ms / 1e3)  # a busy machine does not make it longer, as it would a busy loop
        return self.linear(x)


def sleepy_inputs(seed: int) -> torch.Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Planted:
    """Does `what` when applied."""

    name: str
    what: str = "nothing"
    compiles: bool = False
    numerics: Numerics = Numerics.EXACT
    modes: frozenset = frozenset(Mode)
    summary: str = "planted"

    @property
    def group(self) -> str:
        return self.name

    def probe(self, device):
        return None

    def propose(self, workload, device):
        return (Step(self.name),)

    def ceiling(self, step, prediction, device):
        return float("inf")

    def source(self, step):
        return "pass"

    def apply(self, program: Program, step: Step) -> Program:
        model, inner = program.model, program.call
        if self.what == "segfault":
            ctypes.string_at(0)
        elif self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.what == "hang":
            time.sleep(600)
        elif self.what == "eat":
            held = []
            while True:
                held.append(torch.ones(16 * 1024 * 1024))
        elif self.what == "raise":
            raise RuntimeError("the layer is on fire\nsecond line")
        elif self.what == "faster":
            model.delay_ms *= 0.5
        elif self.what == "slower":
            model.delay_ms *= 2.0
        elif self.what == "nan":
            count = iter(range(1, 10**9))
            program.call = lambda *a: inner(*a) * (float("nan") if next(count) == 3 else 1.0)
        elif self.what == "crawl":
            model.delay_ms = 1500.0
        elif self.what == "wrong":
            model.delay_ms = 0.0
            program.call = lambda *a: inner(*a) * 1.01
        return program
