"""Update all parameters in one kernel: `fused=True` of PyTorch's own optimizers, else `foreach=True`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.ceilings import bounded
from kernel_pytorch.transforms.plain_source import plain_source

__all__ = ["FusedOptimizer", "fuse"]


def fuse(optimizer: torch.optim.Optimizer, implementation: str) -> None:
    """Switch an optimizer to `fused` or `foreach` in place; its state and its groups stay what they are.

    `step` counters move to the parameters' device as float32 tensors, where the fused kernels look for them.
    """
    fused = implementation == "fused"
    for group in optimizer.param_groups:
        group["fused"] = True if fused else None
        group["foreach"] = not fused
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if fused and "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)
    if fused:
        # What the constructors do for fused=True: the kernels unscale gradients of a GradScaler themselves.
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]  # noqa: SLF001


class FusedOptimizer:
    """`implementation=fused|foreach` for Adam, AdamW, SGD and Adagrad."""

    name = "fused_optimizer"
    summary = "update all parameters in one kernel"
    group = "optimizer"
    numerics = Numerics.REORDERED
    modes = frozenset({Mode.TRAINING})
    compiles = False

    def probe(self, device: DeviceSpec) -> Skip | None:
        """PyTorch has fused kernels for CPU, CUDA, ROCm and XPU."""
        return Skip("PyTorch has no fused optimizers for this device") if device.vendor == "tpu" else None

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """Fused first."""
        if workload.mode is not Mode.TRAINING:
            return Skip("an optimizer runs in training only")
        skip = self.probe(device)
        if skip is not None:
            return skip
        return [Step(self.name, {"implementation": name}) for name in ("fused", "foreach")]

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """The update may cost nothing, and so may the overhead of its many small calls."""
        del step, device
        return bounded(prediction, {"optimizer": 0.0, "overhead": 0.0})

    def apply(self, program: Program, step: Step) -> Program:
        """Switch the optimizer's groups; `undo` switches them back."""
        implementation = str(step.params.get("implementation", ""))
        if implementation not in ("fused", "foreach"):
            raise CandidateError(f"unknown implementation {implementation!r}; expected fused or foreach")
        optimizer = program.optimizer
        reason = _unfit(optimizer, implementation)
        if optimizer is None or reason:
            raise CandidateError(f"{step}: {reason}")
        flags = ("fused", "foreach")
        before: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (group, {flag: group[flag] for flag in flags if flag in group}) for group in optimizer.param_groups
        ]
        scaling = "_step_supports_amp_scaling" in vars(optimizer)

        def undo() -> None:
            for group, held in before:
                for flag in flags:
                    group.pop(flag, None)
                group.update(held)
            if not scaling:
                vars(optimizer).pop("_step_supports_amp_scaling", None)

        program.undo.append(undo)
        fuse(optimizer, implementation)
        return program

    def source(self, step: Step) -> str:
        """The same function, applied to the name `optimizer`."""
        return plain_source(fuse, then=f"fuse(optimizer, {step.params['implementation']!r})")


def _unfit(optimizer: torch.optim.Optimizer | None, implementation: str) -> str:
    kinds = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
    if not isinstance(optimizer, kinds):
        return f"{type(optimizer).__name__} is not one of {', '.join(k.__name__ for k in kinds)}"
    if any(group.get(implementation) for group in optimizer.param_groups):
        return f"the optimizer is {implementation} already"
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return "the optimizer is differentiable"
    if not all(p.is_floating_point() for group in optimizer.param_groups for p in group["params"]):
        return "it needs floating-point parameters"
    return ""
