"""Targets of `guard_live.py`: work in equal parts, of which `KPT_LIVE_EXTRA` percent more are done.

Nothing sleeps and nothing is skipped: the extra parts are the same matrix products, activations or steps as the rest.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from kernel_pytorch import Workload

PARTS = 100


def parts() -> int:
    """Return how many parts this process runs."""
    return PARTS + round(PARTS * float(os.environ.get("KPT_LIVE_EXTRA", "0")) / 100.0)


class Products(nn.Module):
    """`count` matrix products of 64 rows, summed, so that a gradient flows through each."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.count = count
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for _ in range(self.count):
            y = torch.relu(y @ self.weight) + x
        return y


def _loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def products() -> Workload:
    """Inference, bound by arithmetic; some ms."""
    return Workload(model=lambda: Products(parts(), 192), inputs=lambda: torch.randn(64, 192))


def launches() -> Workload:
    """Inference, bound by the host: operators of microseconds."""
    return Workload(model=lambda: Products(parts(), 8), inputs=lambda: torch.randn(4, 8))


def training() -> Workload:
    """Whole training steps."""
    return Workload(
        model=lambda: Products(parts(), 128),
        inputs=lambda: torch.randn(64, 128),
        loss=_loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-5),
    )
