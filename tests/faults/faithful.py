"""Transforms without a fault: other ways to the same result, which the validator must not reject."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError

from .damage import around, kind, modules_of, on_output
from .strikes_values import _bfloat16, _epsilon

BOTH = frozenset(Mode)


@dataclass(frozen=True)
class Faithful:
    """A transform that keeps its word; `change` raises CandidateError where it does not apply."""

    name: str
    summary: str
    change: Callable[[Program], None]
    numerics: Numerics = Numerics.REORDERED
    modes: frozenset[Mode] = BOTH
    group: str = field(default="faithful", init=False)
    compiles: bool = field(default=False, init=False)

    def probe(self, device: DeviceSpec) -> Skip | None:
        """Return nothing: it runs anywhere."""
        return None

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """Return its one step."""
        return [Step(self.name)] if workload.mode in self.modes else Skip("for the other mode")

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """Return that nothing is known."""
        return float("inf")

    def apply(self, program: Program, step: Step) -> Program:
        """Rewrite."""
        self.change(program)
        return program

    def source(self, step: Step) -> str:
        """Return a comment: it is never ejected."""
        return f"# {self.summary}"


def _nothing(program: Program) -> None:
    """Leave the program as it is."""


def _split_linear(program: Program) -> None:
    def halves(module: nn.Linear, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        rows = module.out_features // 2
        parts = [
            F.linear(args[0], module.weight[cut], None if module.bias is None else module.bias[cut])
            for cut in (slice(None, rows), slice(rows, None))
        ]
        return torch.cat(parts, -1)

    for module in modules_of(program.model, lambda _, m: type(m) is nn.Linear and m.out_features > 1):
        on_output(program, module, halves)


def _rewritten_norm(program: Program) -> None:
    def by_hand(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        x = args[0].to(torch.promote_types(args[0].dtype, torch.float32))
        if isinstance(module, nn.LayerNorm):
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + _epsilon(module)).sqrt()
        x = module.weight * x.to(output.dtype)
        return x + module.bias if isinstance(module, nn.LayerNorm) else x

    for module in modules_of(program.model, lambda _, m: kind(m) in ("LayerNorm", "LlamaRMSNorm")):
        on_output(program, module, by_hand)


def _folded_norm(program: Program) -> None:
    def folded(module: nn.BatchNorm2d, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        scale = module.weight * (module.running_var + module.eps).rsqrt()
        return args[0] * scale[:, None, None] + (module.bias - module.running_mean * scale)[:, None, None]

    for module in modules_of(program.model, lambda _, m: isinstance(m, nn.BatchNorm2d)):
        on_output(program, module, folded)


def _fused_projections(program: Program) -> None:
    for names in (("query", "key", "value"), ("q_proj", "k_proj", "v_proj")):
        for parent in program.model.modules():
            if all(isinstance(getattr(parent, n, None), nn.Linear) for n in names):
                _fuse(program, [getattr(parent, n) for n in names])
                break
        else:
            continue
        return
    raise CandidateError("no attention with three projections")


def _fuse(program: Program, layers: list[nn.Linear]) -> None:
    ready: list[torch.Tensor] = []

    def first(module: nn.Linear, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        bias = None if module.bias is None else torch.cat([m.bias for m in layers])
        joint = F.linear(args[0], torch.cat([m.weight for m in layers]), bias)
        query, *ready[:] = joint.split([m.out_features for m in layers], -1)
        return query

    def then(module: nn.Linear, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return ready.pop(0)

    for module, hook in zip(layers, (first, then, then), strict=True):
        on_output(program, module, hook)


def _recomputed(program: Program) -> None:
    if any(isinstance(m, nn.BatchNorm2d) for m in program.model.modules()):
        raise CandidateError("recomputing a BatchNorm would update its statistics twice")
    around(program, lambda call, *args, **kwargs: checkpoint(call, *args, use_reentrant=False, **kwargs))


def _low_linear(program: Program) -> None:
    def low(module: nn.Linear, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return _bfloat16(module, args[0], module.bias).to(output.dtype)

    for module in modules_of(program.model, lambda _, m: type(m) is nn.Linear):
        on_output(program, module, low)


def _swapped_optimizer(program: Program) -> None:
    if not isinstance(program.optimizer, torch.optim.AdamW):
        raise CandidateError("the optimizer is not AdamW")
    if any(p.is_complex() for p in program.model.parameters()):
        raise CandidateError("fused AdamW takes no complex parameters")
    old = program.optimizer
    for group in old.param_groups:
        group["foreach"], group["fused"] = False, True


FAITHFUL: tuple[Faithful, ...] = (
    Faithful("identity", "changes nothing", _nothing, Numerics.EXACT),
    Faithful("split_linear", "each linear layer as two", _split_linear),
    Faithful("rewritten_norm", "LayerNorm and RMSNorm by elementary operations", _rewritten_norm),
    Faithful("folded_norm", "BatchNorm as one multiply-add", _folded_norm, modes=frozenset({Mode.INFERENCE})),
    Faithful("fused_projections", "query, key and value by one product", _fused_projections),
    Faithful(
        "recomputed",
        "the forward computed again in the backward",
        _recomputed,
        Numerics.EXACT,
        frozenset({Mode.TRAINING}),
    ),
    Faithful("fused_adamw", "AdamW in one kernel", _swapped_optimizer, modes=frozenset({Mode.TRAINING})),
    Faithful("low_linear", "linear layers in bfloat16", _low_linear, Numerics.LOWER_PRECISION),
)
