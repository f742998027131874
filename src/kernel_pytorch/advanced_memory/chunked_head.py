"""The transform that computes logits and their cross-entropy chunk by chunk (`logits`, `chunked_loss`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kernel_pytorch.advanced_memory.logits import ChunkedLogits
from kernel_pytorch.core.program import model_loss
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError

__all__ = ["ChunkedHead"]

_ROWS = 512


class ChunkedHead:
    """`rows=N, spread=BOOL`: the loss sees its cross-entropy of a linear layer's logits computed by chunks of N rows.

    With `spread`, each chunk takes rows from all over the batch, which lies spread over devices. The loss itself stays
    the user's function. What the layer computed besides is dead code, which a compiler of the step drops; where none
    does, memory is not saved.
    """

    name = "chunked_loss"
    summary = "compute logits, cross-entropy and their gradients chunk by chunk of rows"
    group = "loss"
    numerics = Numerics.REORDERED
    modes = frozenset({Mode.TRAINING})
    compiles = False

    def probe(self, device: DeviceSpec) -> Skip | None:
        """A compiler must drop the logits that nobody uses; GPUs have a kernel of their own."""
        if device.vendor != "tpu":
            return Skip(
                f"saves memory where a compiler sees the whole step, which it does not on {device.vendor}",
                fix="ops.linear_cross_entropy does the same on GPUs",
            )
        return None

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """One step; whether the loss takes a linear layer's result shows when it runs."""
        skip = self.probe(device)
        if skip is not None:
            return skip
        if workload.mode is not Mode.TRAINING:
            return Skip("a loss is computed in training only")
        if not any("nll_loss" in name or "cross_entropy" in name for name in workload.operators):
            return Skip("the workload computes no cross-entropy")
        return [Step(self.name, {"rows": _ROWS})]

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """It makes nothing faster by itself."""
        del step, prediction, device
        return 1.0

    def apply(self, program: Program, step: Step) -> Program:
        """Run the loss under `ChunkedLogits`."""
        rows = int(step.params.get("rows", 0))
        if rows < 1:
            raise CandidateError(f"{step}: rows must be 1 or more")
        before = program.loss
        program.undo.append(lambda: setattr(program, "loss", before))
        program.loss = _Chunked(before or model_loss, rows, step, spread=bool(step.params.get("spread", False)))
        return program

    def source(self, step: Step) -> str:
        """It has none: following logits to their loss is code of this package.

        Raises:
            CandidateError: Always.
        """
        raise CandidateError(
            f"{step} cannot be written as plain PyTorch for a model it has not seen run",
            fix="keep using the plan with kernel_pytorch, or optimise without chunked_loss",
        )


class _Chunked:
    """A loss under `ChunkedLogits`, which must find what it replaces."""

    def __init__(self, loss: Callable[[Any, Any], torch.Tensor], rows: int, step: Step, *, spread: bool) -> None:
        self.loss = loss
        self.spread = spread
        self.rows = rows
        self.step = step

    def __call__(self, model: Any, batch: Any) -> torch.Tensor:
        mode = ChunkedLogits(self.rows, spread=self.spread)
        with mode:
            loss = self.loss(model, batch)
        if not mode.replaced:
            raise CandidateError(f"{self.step}: {mode.passed or 'the loss computes no cross-entropy'}")
        return loss
