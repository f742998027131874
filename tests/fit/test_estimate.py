"""Estimated memory of an eager step: by hand for a small one, and against the allocator of a measured one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kernel_pytorch.backends.tpu.steps import trace_step
from kernel_pytorch.core.program import begin
from kernel_pytorch.core.types import Mode
from kernel_pytorch.fit.estimate import estimate_memory

MIB = 1 << 20


class Chain(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = x * 2.0
        return x.view(-1)


def test_what_nothing_reads_any_more_is_gone() -> None:
    step = trace_step(begin(Chain(), Mode.INFERENCE, {}), torch.empty(MIB), device="cpu")
    found = estimate_memory(step)
    assert found.held_bytes == 4 * MIB  # the input
    assert found.peak_bytes == 12 * MIB  # and one result with the one before it; the view is no memory
    assert found.moved_bytes == 4 * 2 * 4 * MIB


def test_training_keeps_activations_until_they_are_read_backward() -> None:
    width, layers, batch = 256, 3, 512
    model = nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(width, width), nn.Tanh())))
    program = begin(
        model,
        Mode.TRAINING,
        {},
        optimizer=torch.optim.AdamW(model.parameters()),
        loss=lambda m, x: m(x).square().sum(),
    )
    step = trace_step(program, torch.empty(batch, width), device="cpu")
    found = estimate_memory(step)
    activation, weights = 4 * batch * width, 4 * layers * (width * width + width)
    assert found.held_bytes == pytest.approx(3 * weights + activation, rel=0.02)
    # Each layer's tanh is kept, a product or a gradient or two are on the way, and gradients of weights pile up.
    above = found.peak_bytes - found.held_bytes
    assert layers * activation < above < (layers + 3) * activation + weights
    assert sum(b.bytes for b in found.buffers) == above
