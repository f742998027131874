"""Targets for the worker processes of the guard's tests: one tiny model, and what can go wrong with it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from kernel_pytorch import Case, Workload


class Net(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.layers = layers
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        for _ in range(self.layers):
            x = torch.relu(self.linear(x))
        self.act()
        return x

    def act(self) -> None:
        """What a faulty subclass does in each call."""


Net.__qualname__ = "Net"


def _inputs() -> torch.Tensor:
    return torch.randn(32, 64)


def _loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def _workload(model: type[nn.Module], *args: int) -> Workload:
    return Workload(model=lambda: model(*args), inputs=_inputs, loss=_loss)


def quick() -> Workload:
    return _workload(Net, 2)


def slow() -> Workload:
    return _workload(Net, 20)


def two_cases() -> Workload:
    return Workload(
        model=Net, inputs={"small": Case(lambda: torch.randn(4, 64), 3.0), "large": Case(lambda: torch.randn(64, 64))}
    )


def other_inputs() -> Workload:
    return Workload(model=Net, inputs=lambda: torch.randn(33, 64), loss=_loss)


class Wider(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 65)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def wider() -> Workload:
    return _workload(Wider)


class _Faulty(Net):
    """Well for some samples."""

    def act(self) -> None:
        if self.calls >= 1500:
            self.fail()

    def fail(self) -> None:
        raise NotImplementedError


class Raises(_Faulty):
    def fail(self) -> None:
        raise RuntimeError("one call too many")


class Dies(_Faulty):
    def fail(self) -> None:
        print("about to be killed", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


class Hangs(_Faulty):
    def fail(self) -> None:
        print("about to hang", file=sys.stderr, flush=True)
        time.sleep(600)


class Exits(_Faulty):
    def fail(self) -> None:
        sys.exit(3)


class Prints(Net):
    def act(self) -> None:
        print('{"error": "I am no answer"}', flush=True)
        os.write(1, b"nor am I, and I end no line")


class Remembers(Net):
    """Writes its process id where the test looks."""

    def act(self) -> None:
        Path(os.environ["KPT_TEST_PID_FILE"]).write_text(str(os.getpid()))


for _kind in (Raises, Dies, Hangs, Exits, Prints, Remembers):
    _kind.__qualname__ = "Net"


def raises() -> Workload:
    return _workload(Raises)


def dies() -> Workload:
    return _workload(Dies)


def hangs() -> Workload:
    return _workload(Hangs)


def exits() -> Workload:
    return _workload(Exits)


def prints() -> Workload:
    return _workload(Prints)


def remembers() -> Workload:
    return _workload(Remembers)


def raises_at_once() -> Workload:
    raise OSError("no disk")


def dies_at_once() -> Workload:
    print("no more of this", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def hangs_at_once() -> Workload:
    time.sleep(600)
    raise AssertionError
