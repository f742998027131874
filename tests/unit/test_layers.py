"""Times by layer: a step that does not fit a layer leaves that layer as it is, and the others are told all the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kernel_pytorch import KernelPyTorchConfig, Workload
from kernel_pytorch.backends import manager_for
from kernel_pytorch.core.types import Candidate, Step
from kernel_pytorch.search.bench import prepare_bench
from kernel_pytorch.search.layers import layer_times


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.norm(x)).relu())


@pytest.mark.parametrize(
    "steps",
    [(Step("prepack"),), (Step("dtype", {"to": "bfloat16", "how": "cast"}), Step("prepack"))],
    ids=["prepack", "cast, prepack"],
)
def test_layers_without_anything_to_pack_are_timed_too(steps):
    workload = Workload(Net, lambda seed: torch.randn(4, 16))
    bench = prepare_bench(workload, KernelPyTorchConfig(), manager_for("cpu"), seed=0)
    times = layer_times(bench, Candidate(steps))
    assert set(times) == {"norm", "up", "down"}
    assert all(before > 0 and after > 0 for before, after in times.values())
