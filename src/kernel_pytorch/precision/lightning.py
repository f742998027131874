"""FP8 for the Trainer of Lightning: a precision plugin that converts, watches, saves and resumes.

    trainer = Trainer(plugins=[Float8Precision()])
    trainer.fit(module)

Needs `lightning` or `pytorch-lightning`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from kernel_pytorch.precision.convert import Report, convert, report, swapped
from kernel_pytorch.precision.monitor import DEFAULT_BOUNDS, Bounds, Monitor
from kernel_pytorch.precision.recipes import Recipe
from kernel_pytorch.precision.state import load_state, named_sites, state

_NAMES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}


def _precision() -> Any:
    """Return the class to derive from, of the package that the program uses already, else of one that is installed."""
    found = [n for n in _NAMES if n in sys.modules] or [n for n in _NAMES if importlib.util.find_spec(n) is not None]
    return importlib.import_module(f"{_NAMES[(found or list(_NAMES))[0]]}.plugins.precision").Precision


_Precision: Any = _precision()

__all__ = ["Float8Precision"]


class Float8Precision(_Precision):  # type: ignore[misc]
    """Train linear layers in FP8 with Lightning.

    Args:
        recipe: As of `kp.precision.convert`.
        example_inputs: As of `kp.precision.convert`, of the LightningModule's `forward`.
        exclude: As of `kp.precision.convert`.
        autocast: What the rest computes in: `torch.bfloat16` by `torch.autocast`, or `None` as the module does.
        every: One optimizer step in so many is watched; 0 watches none.
        bounds: Of what a layer may lose before it falls back; `None` lets none.
        write_to: As of `Monitor`.

    Attributes:
        monitor: Where a layer runs in FP8 and `every` is not 0.
        told: What became of each layer.
    """

    def __init__(
        self,
        recipe: str | Recipe = "auto",
        *,
        example_inputs: Any = None,
        exclude: Collection[str] = (),
        autocast: torch.dtype | None = torch.bfloat16,
        every: int = 16,
        bounds: Bounds | None = DEFAULT_BOUNDS,
        write_to: str | Path | None = None,
    ) -> None:
        self._recipe, self._inputs, self._exclude, self._autocast = recipe, example_inputs, exclude, autocast
        self._every, self._bounds, self._write_to = every, bounds, write_to
        self._model: Any = None
        self.monitor: Monitor | None = None
        self.told: Report | None = None

    def convert_module(self, module: torch.nn.Module) -> torch.nn.Module:
        """Let the module's linear layers run in FP8, in place."""
        if not swapped(module):
            convert(module, self._recipe, example_inputs=self._inputs, exclude=self._exclude)
        self._model, self.told = module, report(module)
        return module

    def forward_context(self) -> AbstractContextManager[None]:
        """Return the autocast that a step runs under."""
        if self._autocast is None or self._model is None:
            return nullcontext()
        kind = next(self._model.parameters()).device.type
        return torch.autocast(kind, dtype=self._autocast)

    def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        """Step, with the closure that computes gradients, and tell the monitor that the step ended."""
        if self.monitor is None and self._every and named_sites(self._model):
            # Here, where the module has reached its device.
            self.monitor = Monitor(self._model, every=self._every, bounds=self._bounds, write_to=self._write_to)
        out = super().optimizer_step(optimizer, model, closure, **kwargs)
        if self.monitor is not None:
            self.monitor.step()
        return out

    def state_dict(self) -> dict[str, Any]:
        """Return the scaling state, which Lightning keeps in its checkpoints."""
        return state(self._model) if self.told is not None and self.told.converted else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a scaling state of a checkpoint."""
        if state_dict:
            load_state(self._model, state_dict)

    def teardown(self) -> None:
        """End what the monitor writes, and take its last word on the layers."""
        if self.monitor is not None:
            self.monitor.close()
            self.monitor = None
        if self._model is not None:
            self.told = report(self._model)
