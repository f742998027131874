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
    """`count` matrix products of all rows, summed, so that a gradient flows through each."""

    def __init__(self, count: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.count = count
        self.weight = nn.Parameter((torch.randn(width, width) / width**0.5).to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for _ in range(self.count):
            y = torch.relu(y @ self.weight) + x
        return y


def _loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-5)


def products() -> Workload:
    """Inference, bound by arithmetic; some ms of a CPU."""
    return Workload(model=lambda: Products(parts(), 192), inputs=lambda: torch.randn(64, 192))


def launches() -> Workload:
    """Inference, bound by the host: operators of microseconds, on a CPU and on a GPU."""
    return Workload(model=lambda: Products(parts(), 8), inputs=lambda: torch.randn(4, 8))


def training() -> Workload:
    """Whole training steps; some ms of a CPU."""
    return Workload(
        model=lambda: Products(parts(), 128),
        inputs=lambda: torch.randn(64, 128),
        loss=_loss,
        optimizer=_adamw,
    )


def gpu_products() -> Workload:
    """Inference, bound by arithmetic; some ms of a GPU."""
    return Workload(
        model=lambda: Products(parts(), 2048, torch.bfloat16),
        inputs=lambda: torch.randn(4096, 2048).to(torch.bfloat16),
    )


def gpu_training() -> Workload:
    """Whole training steps; some ms of a GPU, whose kernels take longer than their launches."""
    return Workload(
        model=lambda: Products(parts(), 1024, torch.bfloat16),
        inputs=lambda: torch.randn(8192, 1024).to(torch.bfloat16),
        loss=_loss,
        optimizer=_adamw,
    )
