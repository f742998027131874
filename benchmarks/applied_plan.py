"""`make_step(model, lr)` for the side-by-side training harness: a plan of `kpt optimize`, applied, and nothing else.

KPT_PLAN=out/llama python train_peers.py --ours benchmarks/applied_plan.py:make_step
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn

import kernel_pytorch as kp


def make_step(model: nn.Module, lr: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return `step(ids)`: the user's own loop over what `kp.prepare` returned."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    plan = kp.load_plan(os.environ["KPT_PLAN"])
    (ids, *_) = next(iter(plan.workload.signatures.values()))
    example = torch.zeros(ids.shape, dtype=torch.int64, device=next(model.parameters()).device)
    inputs = {"input_ids": example, "labels": example}
    model, optimizer = kp.prepare(model, optimizer, plan=os.environ["KPT_PLAN"], inputs=inputs)

    def step(ids: torch.Tensor) -> torch.Tensor:
        loss = kp.fused_loss(model, {"input_ids": ids, "labels": ids})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
