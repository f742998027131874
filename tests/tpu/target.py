"""Small workloads that the tests of whole searches take by name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kernel_pytorch.core.workload import Call, Case, Workload


def model() -> nn.Module:
    """Two layers."""
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))


def rows(seed: int, count: int = 32) -> Call:
    """Return a call with so many rows."""
    return Call((torch.randn(count, 64, generator=torch.Generator().manual_seed(seed)),))


def inference() -> Workload:
    """One shape."""
    return Workload(model, rows, name="mlp")


def mixed() -> Workload:
    """Three shapes that fit two buckets."""
    cases = {str(n): Case(lambda seed, n=n: rows(seed, n)) for n in (3, 7, 12)}
    return Workload(model, cases, name="mixed")


def training() -> Workload:
    """Regression onto the inputs."""
    return Workload(model, rows_as_batch, loss=lambda m, x: F.mse_loss(m(x), x), name="mlp")


def rows_as_batch(seed: int) -> torch.Tensor:
    """Return what the loss takes."""
    return rows(seed).args[0]
