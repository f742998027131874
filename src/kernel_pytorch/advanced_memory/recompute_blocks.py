"""The transform that recomputes the repeated blocks of a model in the backward (`recompute`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from kernel_pytorch.advanced_memory.recompute import Recomputed
from kernel_pytorch.core.blocks import blocks_of
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError

__all__ = ["RecomputeBlocks"]

_FEWEST = 2


class RecomputeBlocks:
    """`block=CLASS, keep=NAMES, plain=N, spread=BOOL`: blocks keep inputs and named results, and recompute the rest.

    `keep` is a comma-separated list of names as `recompute.Results` gives them (`attention:0,product:3`), or empty.
    The last `plain` blocks keep everything: their backward comes first, when what they would recompute is there still.
    `spread` says that parameters lie spread over devices (`recompute.Recomputed`).
    """

    name = "recompute"
    summary = "keep the inputs of repeated blocks and compute the rest again in the backward, where memory is short"
    group = "recompute"
    numerics = Numerics.EXACT
    modes = frozenset({Mode.TRAINING})
    compiles = False

    def probe(self, device: DeviceSpec) -> Skip | None:
        """It pays in memory only; a search by speed proposes it where a device's own compiler needs the barrier."""
        if device.vendor != "tpu":
            return Skip(
                f"recomputing saves memory and costs time; a search by speed does not propose it on {device.vendor}",
                fix="kpt fit searches memory patterns",
            )
        return None

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """The class that repeats with most in it; nothing kept but inputs."""
        skip = self.probe(device)
        if skip is not None:
            return skip
        if workload.mode is not Mode.TRAINING:
            return Skip("nothing is kept for a backward in inference")
        names = [name for name, count in workload.blocks.items() if count >= _FEWEST]
        if not names:
            return Skip(f"no class of blocks repeats {_FEWEST} times or more")
        return [Step(self.name, {"block": names[0], "keep": "", "plain": 1})]

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """It makes nothing faster by itself."""
        del step, prediction, device
        return 1.0

    def apply(self, program: Program, step: Step) -> Program:
        """Route the call of each block through `Recomputed`, in the slot that `nn.Module.compile` uses."""
        name = str(step.params.get("block", ""))
        keep = tuple(filter(None, str(step.params.get("keep", "")).split(",")))
        blocks = blocks_of(program.model, name)
        if not blocks:
            raise CandidateError(f"the model has no module of class {name!r}")
        if program.model in blocks:
            raise CandidateError(f"{name!r} is the model itself: nothing would be saved")
        if any(block._compiled_call_impl is not None for block in blocks):  # noqa: SLF001
            raise CandidateError(f"{step} cannot follow a step that compiled the blocks")
        for block in blocks[: len(blocks) - int(step.params.get("plain", 0))]:
            program.undo.append(lambda block=block: _set_call(block, None))  # type: ignore[misc]
            _set_call(block, Recomputed(block, keep, spread=bool(step.params.get("spread", False))))
        return program

    def source(self, step: Step) -> str:
        """It has none: the barrier and the choice of what to keep are code of this package.

        Raises:
            CandidateError: Always.
        """
        raise CandidateError(
            f"{step} cannot be written as plain PyTorch: torch.utils.checkpoint has no barrier, and a compiler of the "
            "whole step undoes it",
            fix="keep using the plan with kernel_pytorch, or optimise without recompute",
        )


def _set_call(block: nn.Module, call: Any) -> None:
    block._compiled_call_impl = call  # noqa: SLF001
