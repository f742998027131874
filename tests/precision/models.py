"""Small models in FP8 for tests, with everything that layers can be: alone, sharing an input, a gated MLP."""

from __future__ import annotations

import torch
from torch import nn

import kernel_pytorch as kp
from kernel_pytorch.precision.recipes import Recipe


class Block(nn.Module):
    """Two layers that read the same tensor, a gated MLP and one layer alone, around a norm."""

    def __init__(self, width: int = 32, inner: int = 48) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = SwiGLU(width, inner)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.out(x + self.mlp(torch.tanh(self.query(y)) * self.key(y)))


class SwiGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def block(recipe: str | Recipe, seed: int = 0) -> nn.Module:
    """Return a block in FP8."""
    torch.manual_seed(seed)
    return kp.precision.convert(Block(), recipe, example_inputs=(torch.randn(4, 32),))


def batches(count: int, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return inputs and targets whose size grows and shrinks, so that delayed scales move."""
    made = torch.Generator().manual_seed(seed)
    sizes = [1.0, 5.0, 0.3, 2.0]
    return [
        (torch.randn(6, 32, generator=made) * sizes[i % len(sizes)], torch.randn(6, 32, generator=made))
        for i in range(count)
    ]
