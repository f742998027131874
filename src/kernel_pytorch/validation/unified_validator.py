"""Compare any two modules: the same function, and how fast one is against the other."""

from __future__ import annotations

from typing import Any

from torch import nn

from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.program import begin
from kernel_pytorch.core.types import Candidate, NumericsReport
from kernel_pytorch.core.workload import as_workload
from kernel_pytorch.validation.numerics import Subject, judge

__all__ = ["UnifiedValidator"]


class UnifiedValidator:
    """Validates one module against another; what produced it need not be known."""

    def __init__(self, config: KernelPyTorchConfig | None = None) -> None:
        self.config = config or KernelPyTorchConfig()

    def validate(
        self, candidate: nn.Module, reference: nn.Module, inputs: Any, level: str = "standard"
    ) -> NumericsReport:
        """Return every comparison of two modules."""
        workload = as_workload((reference, inputs))
        calls = {"main": workload.call("main", 0)}
        program = begin(candidate, self.config.mode, calls)
        return judge(
            Subject(
                workload=workload, candidate=Candidate(), config=self.config, reference=reference, program=program,
                build=lambda model, _, calls: begin(model, self.config.mode, calls), place=lambda x: x,
                structural=lambda _: True,
            ),
            level=level,
        )
