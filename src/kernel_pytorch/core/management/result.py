"""What a search returns: the plan, and the model it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from kernel_pytorch.catalog import TRANSFORMS
from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.protocols import Transform
from kernel_pytorch.core.types import Mode, Plan
from kernel_pytorch.core.workload import Call
from kernel_pytorch.plan.apply import apply
from kernel_pytorch.plan.store import SearchDirectory
from kernel_pytorch.report.html import write_html

__all__ = ["Result"]


@dataclass(slots=True)
class Result:
    """What a search returns.

    Attributes:
        plan: The plan with its evidence.
        original: The user's unmodified model.
        calls: Example inputs by case.
        config: What was asked for.
        transforms: What the steps of the plan name.
    """

    plan: Plan
    original: nn.Module
    calls: dict[str, Call]
    config: KernelPyTorchConfig
    transforms: Sequence[Transform] = TRANSFORMS
    _model: nn.Module | None = None

    @property
    def model(self) -> nn.Module:
        """The optimised model: a new module of the same class; the original itself where nothing won."""
        if not self.plan.candidate.steps:
            return self.original
        if self._model is None:
            self._model = self._apply(None)
        return self._model

    def _apply(self, deploy_to: Path | None) -> nn.Module:
        return apply(
            self.plan,
            self.original,
            inputs=self.calls,
            outside=self.config.outside,
            transforms=self.transforms,
            deploy_to=deploy_to,
        )

    def save(self, directory: str | Path) -> Path:
        """Write `plan.json`, `report.html` and what the steps deploy (`artifacts/`), and return the directory."""
        with SearchDirectory(Path(directory)) as store:
            self.write(store)
        return Path(directory)

    def write(self, store: SearchDirectory) -> None:
        """Write the same into a directory that is held already."""
        store.write_plan(self.plan)
        if self.plan.candidate.steps and self.plan.workload.mode is Mode.INFERENCE:  # what trains is not deployed
            self._apply(store.make_artifacts())
            if not any(store.artifacts.iterdir()):
                store.artifacts.rmdir()
        write_html(self.plan, store.path / "report.html")
