"""Run `kpt` as a user does, and small targets to run it on."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests import forks

MAKE_PLAN = Path(__file__).parent / "make_plan.py"

SOURCE = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width=16):
            super().__init__()
            self.first = nn.Linear(8, width)
            self.second = nn.Linear(width, 2)

        def forward(self, x):
            return self.second(self.first(x).relu())

    def net():
        torch.manual_seed(0)
        print("the user's own print")
        return Net(), torch.randn(4, 8)

    def shifted():
        model, x = net()
        with torch.no_grad():
            model.second.bias += 0.5
        return model, x

    def early():
        model, x = net()
        with torch.no_grad():
            model.first.weight[3, 3] += 0.5
        return model, x

    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

        def forward(self, x):
            return self.body(x)

    def renamed():
        model, x = Renamed(), net()[1]
        model.body.load_state_dict(dict(zip(model.body.state_dict(), net()[0].state_dict().values())))
        return model, x

    def wide():
        return Net(32), torch.randn(4, 8)

    def raises():
        raise RuntimeError("the user's own error")

    def misfit():
        return Net(), torch.randn(4, 9)

    class Nan(Net):
        def forward(self, x):
            return super().forward(x) * float("nan")

    def nan():
        return Nan(), torch.randn(4, 8)

    def nothing():
        return 3
"""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Return a directory with targets in it."""
    (tmp_path / "nets.py").write_text(textwrap.dedent(SOURCE))
    return tmp_path


@pytest.fixture
def kpt(files: Path) -> Callable[..., Done]:
    """Return a function that runs `kpt` in that directory."""

    def run(*arguments: str, **environment: str) -> Done:
        added = {"COLUMNS": "100", **environment}
        done = forks.python("-m", "kernel_pytorch", *arguments, cwd=files, environment=added)
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def make_plan(files: Path) -> Callable[..., None]:
    """Return a function that writes a plan there; it takes the arguments of `make_plan.py`."""

    def make(*arguments: str) -> None:
        forks.python(MAKE_PLAN, *arguments, cwd=files).check_returncode()

    return make
