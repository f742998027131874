"""The definition of the update, in plain PyTorch, for any float dtype; fp64 is the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["step"]


@torch.no_grad()
def step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    decoupled: bool = True,
) -> None:
    """Take one step of Adam in place: algorithm 2 of Loshchilov and Hutter (arXiv:1711.05101), as `torch.optim.AdamW`.

    Each update is computed in fp32, or in fp64 where the parameter is fp64, and rounded once to what is stored.
    """
    beta1, beta2 = betas
    for param, grad, exp_avg, exp_avg_sq, count in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        wide = torch.float64 if param.dtype is torch.float64 else torch.float32
        p, g, m, v = (x.to(wide) for x in (param, grad, exp_avg, exp_avg_sq))
        count.add_(1)
        t = float(count)
        g = -g if maximize else g
        if decoupled:
            p = p - lr * weight_decay * p
        elif weight_decay:
            g = g + weight_decay * p
        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        p = p - lr / (1 - beta1**t) * (m / (v.sqrt() / (1 - beta2**t) ** 0.5 + eps))
        param.copy_(p)
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
