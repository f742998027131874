"""Compare any two modules: are they the same function, where do they first part, and is one slower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.program import begin, clone_call, clone_model
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import Candidate, Mode, NumericsReport, Step
from kernel_pytorch.core.workload import Call, as_call, as_workload
from kernel_pytorch.validation.lift import lifted_model
from kernel_pytorch.validation.locate import first_difference
from kernel_pytorch.validation.numerics import Subject, judge
from kernel_pytorch.validation.performance import PerformanceVerdict, judge_speed
from kernel_pytorch.validation.vary import zero_dropout

__all__ = ["PerformanceVerdict", "UnifiedValidator", "first_divergence"]

_SAME = 1e-4  # error of a layer's worst row that parts two models of one precision
_LOW = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


class UnifiedValidator:
    """Validates one module against another; how it came about need not be known."""

    def __init__(self, config: KernelPyTorchConfig | None = None) -> None:
        self.config = config or KernelPyTorchConfig()

    def validate(
        self, candidate: nn.Module, reference: nn.Module, inputs: Any, level: str = "standard"
    ) -> NumericsReport:
        """Compare two modules; neither is changed.

        Where the `state_dict` keys and shapes of both agree, they are also compared in fp64 at perturbed parameters and
        on varied inputs, so that what hides behind a bias of 0 is seen. `diverged_at` names the first layer that parts.

        Args:
            candidate: What to judge.
            reference: What it must equal.
            inputs: Example inputs, as `kernel_pytorch.optimize` takes them.
            level: `quick`, `standard` or `strict`.
        """
        calls = {"main": (workload := as_workload((reference, inputs))).call("main", 0)}
        steps = [Step("candidate")] if _same_state(candidate, reference) else []
        dtype = _main_dtype(candidate)
        low = None if dtype is None or dtype is _main_dtype(reference) else _LOW.get(dtype)
        if low:
            steps.append(Step("dtype", {"to": low}))
        report = judge(
            Subject(
                workload=workload, candidate=Candidate(tuple(steps)), config=self.config, reference=reference,
                program=begin(clone_model(candidate), self.config.mode, calls),
                build=partial(_with_state, candidate, self.config.mode), place=lambda tree: tree,
                structural=lambda step: step.transform == "candidate",
            ),
            level=level,
        )  # fmt: skip
        tolerance = self.config.max_error if low else _SAME
        parted = not report.passed and first_divergence(candidate, reference, calls["main"], tolerance=tolerance)
        return replace(report, diverged_at=report.diverged_at or parted or "")

    def check_performance(
        self, candidate: nn.Module, reference: nn.Module, inputs: Any, *, max_slowdown: float = 0.03
    ) -> PerformanceVerdict:
        """Time two modules side by side and say whether the candidate is slower.

        Args:
            candidate: What may have become slower.
            reference: What it is compared with.
            inputs: Example inputs, at the modules' own device.
            max_slowdown: The smallest slowdown that matters, as a fraction.

        Returns:
            `PASS` where any slowdown is proven to be smaller than that, `FAIL` where the candidate is proven slower and
            by at least half of it, else `INCONCLUSIVE`; see `validation.regression` for the error rates.

        Raises:
            ValueError: A `max_slowdown` not above 0.
        """
        return judge_speed(
            candidate, reference, as_call(inputs), training=self.config.mode is Mode.TRAINING,
            max_seconds=min(30.0, self.config.budget_s or 30.0), max_slowdown=max_slowdown,
        )  # fmt: skip


def first_divergence(candidate: nn.Module, reference: nn.Module, call: Any, *, tolerance: float = _SAME) -> str:
    """Return the path of the first submodule whose output differs; empty where none does; neither is changed.

    Args:
        candidate: Its submodule paths are matched with the reference's.
        reference: What it must equal, in the mode in which to compare.
        call: Example inputs.
        tolerance: Relative error of the worst row that counts as different.
    """
    mode = Mode.TRAINING if reference.training else Mode.INFERENCE
    mine, theirs = clone_model(candidate), clone_model(reference)
    return first_difference(mine, mine, theirs, clone_call(as_call(call)), mode, tolerance=tolerance)


def _main_dtype(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def _same_state(candidate: nn.Module, reference: nn.Module) -> bool:
    mine, theirs = (
        {k: tuple(v.shape) for k, v in m.state_dict().items() if isinstance(v, torch.Tensor)}
        for m in (candidate, reference)
    )
    return mine == theirs


def _with_state(
    candidate: nn.Module, mode: Mode, perturbed: nn.Module, part: Candidate, calls: Mapping[str, Call]
) -> Program:
    """Return the candidate at the state and precision of a perturbed copy of the reference."""
    del part
    model = clone_model(candidate)
    zero_dropout(model)
    if _main_dtype(perturbed) is torch.float64:
        lifted_model(model)
    elif _main_dtype(perturbed) is not _main_dtype(model):
        model.to(_main_dtype(perturbed))
    model.load_state_dict(perturbed.state_dict())
    return begin(model, mode, calls)
