"""FP8 for the Trainer of Hugging Face: one callback that converts, watches, saves and resumes.

    trainer = Trainer(..., callbacks=[Float8Callback()])
    trainer.train()

Needs `transformers` with `accelerate`. The model's checkpoints keep their keys; the scaling state lies beside them.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from kernel_pytorch.precision.convert import Report, convert, report, swapped
from kernel_pytorch.precision.monitor import DEFAULT_BOUNDS, Bounds, Monitor
from kernel_pytorch.precision.recipes import Recipe
from kernel_pytorch.precision.state import hold_weights, load_state, named_sites
from kernel_pytorch.precision.state import state as scaling_state

__all__ = ["STATE_FILE", "Float8Callback"]

STATE_FILE = "float8.pt"
"""In each checkpoint's directory."""


class Float8Callback(TrainerCallback):
    """Train in FP8 with `transformers.Trainer`.

    Args:
        recipe: As of `kp.precision.convert`.
        example_inputs: As of `kp.precision.convert`, to see which layers read the same tensor: a batch as a dict.
        exclude: As of `kp.precision.convert`.
        every: One optimizer step in so many is watched; 0 watches none.
        bounds: Of what a layer may lose before it falls back; `None` lets none.
        write_to: As of `Monitor`; of the main process only.

    Attributes:
        monitor: While training, where a layer runs in FP8 and `every` is not 0.
        told: What became of each layer, once training has begun.
    """

    def __init__(
        self,
        recipe: str | Recipe = "auto",
        *,
        example_inputs: Any = None,
        exclude: Collection[str] = (),
        every: int = 16,
        bounds: Bounds | None = DEFAULT_BOUNDS,
        write_to: str | Path | None = None,
    ) -> None:
        self._recipe, self._inputs, self._exclude = recipe, example_inputs, exclude
        self._every, self._bounds, self._write_to = every, bounds, write_to
        self._model: Any = None
        self.monitor: Monitor | None = None
        self.told: Report | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Convert the model and, in a run that goes on from a checkpoint, take up its scaling state."""
        del control
        model = kwargs["model"]
        if not swapped(model):
            convert(model, self._recipe, example_inputs=self._inputs, exclude=self._exclude)
        self._model, self.told = model, report(model)
        if state.global_step and self.told.converted:
            self._resume(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE)
        if not named_sites(model):
            return
        if args.gradient_accumulation_steps > 1 and kwargs.get("optimizer") is not None:
            hold_weights(model, getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"]))
        if self._every:
            where = self._write_to if state.is_world_process_zero else None
            self.monitor = Monitor(model, every=self._every, bounds=self._bounds, write_to=where)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the monitor that an optimizer step ended."""
        del args, state, control, kwargs
        if self.monitor is not None:
            self.monitor.step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the scaling state into the checkpoint that has just been written."""
        del control, kwargs
        if self.told is not None and self.told.converted and state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(scaling_state(self._model), folder / STATE_FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End what the monitor writes, and take its last word on the layers."""
        del args, state, control, kwargs
        if self.monitor is not None:
            self.monitor.close()
            self.monitor = None
        if self._model is not None:
            self.told = report(self._model)

    def _resume(self, path: Path) -> None:
        if path.exists():
            load_state(self._model, torch.load(path, weights_only=True))
        else:
            warnings.warn(f"{path} is not there: scales of FP8 start anew in the middle of a run", stacklevel=2)
