"""What a search returns: the plan, and the model it makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        given: The user's unmodified model, where it was.
        calls: Example inputs by case.
        config: What was asked for.
        transforms: What the steps of the plan name.
        place: Puts a model or inputs on the plan's device, at the first use.
    """

    plan: Plan
    given: nn.Module
    calls: dict[str, Call]
    config: KernelPyTorchConfig
    transforms: Sequence[Transform] = TRANSFORMS
    place: Callable[[Any], Any] = lambda tree: tree
    _model: nn.Module | None = None
    _original: nn.Module | None = None

    @property
    def original(self) -> nn.Module:
        """The user's unmodified model, on the plan's device."""
        if self._original is None:
            self._original = self.place(self.given)
        return self._original

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
            inputs=self.place(self.calls),
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
        # What trains is not deployed, and no step of a TPU writes files: the chip is not taken for them.
        deploys = self.plan.workload.mode is Mode.INFERENCE and self.plan.device.vendor != "tpu"
        if self.plan.candidate.steps and deploys:
            self._apply(store.make_artifacts())
            if not any(store.artifacts.iterdir()):
                store.artifacts.rmdir()
        write_html(self.plan, store.path / "report.html")
