"""Versions of parameters whose updates PyTorch does not count.

PyTorch's fused optimizers write parameters and leave their `_version` as it was (seen in 2.9 and 2.13 on a CPU, in 2.11
on a GPU), where every other in-place write counts it up. Whoever keeps something that was made of a parameter, as a
weight in FP8, then takes a trained parameter for the one it was. Once asked for, each step of such an optimizer counts:
when it begins, so that hooks of the optimizer itself, which run at its end, find the version that stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

__all__ = ["count_fused_updates"]

_counting: list[Any] = []


def count_fused_updates() -> None:
    """Let steps of fused optimizers count up the versions of their parameters, in this process from now on."""
    if not _counting:
        _counting.append(register_optimizer_step_pre_hook(_count))


def _count(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    del args, kwargs
    written = [p for group in optimizer.param_groups if group.get("fused") for p in group["params"]]
    if written:
        torch.autograd.graph.increment_version(written)
