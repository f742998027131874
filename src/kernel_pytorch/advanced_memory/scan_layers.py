"""The transform that runs consecutive blocks of a model as one loop with rematerialisation (`scan_layers`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kernel_pytorch.advanced_memory.scanned import ScannedRun
from kernel_pytorch.core.blocks import runs_of
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError

__all__ = ["ScanLayers"]

_FEWEST = 2


class ScanLayers:
    """`block=CLASS, keep=NAMES, plain=N`: consecutive blocks are one loop over stacked weights, and are recomputed.

    The compiler sees one block instead of all. `keep` names results of a block to keep from forward to backward, as
    `recompute` has them. The last `plain` blocks of each run stay outside its loop and keep everything: their backward
    comes first, when what they would recompute is there still.
    """

    name = "scan_layers"
    summary = "run repeated blocks as one loop over stacked weights that recomputes them in the backward"
    group = "recompute"
    numerics = Numerics.REORDERED
    modes = frozenset({Mode.TRAINING})
    compiles = False

    def probe(self, device: DeviceSpec) -> Skip | None:
        """Only XLA has a loop in a program of the whole step."""
        if device.vendor != "tpu":
            return Skip(
                f"a loop over blocks is for compilers of whole steps; PyTorch's on {device.vendor} has none",
                fix="regional_compile compiles a repeated block once",
            )
        return None

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """The class that repeats; whether its blocks are one function shows when they run."""
        skip = self.probe(device)
        if skip is not None:
            return skip
        if workload.mode is not Mode.TRAINING:
            return Skip("nothing is kept for a backward in inference")
        names = [name for name, count in workload.blocks.items() if count >= _FEWEST]
        if not names:
            return Skip(f"no class of blocks repeats {_FEWEST} times or more")
        if any("dropout" in name for name in workload.operators):
            return Skip("random numbers are drawn (dropout), which every step of a loop would have to draw anew")
        return [Step(self.name, {"block": names[0], "keep": "", "plain": 0})]

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """It makes nothing faster by itself."""
        del step, prediction, device
        return 1.0

    def apply(self, program: Program, step: Step) -> Program:
        """Route the calls of each run's blocks through `ScannedRun`, in the slot that `nn.Module.compile` uses."""
        name, plain = str(step.params.get("block", "")), int(step.params.get("plain", 0))
        keep = tuple(filter(None, str(step.params.get("keep", "")).split(",")))
        runs = [run[: len(run) - plain] for run in runs_of(program.model, name)]
        runs = [run for run in runs if len(run) >= _FEWEST]
        if not runs:
            beside = f" beside the last {plain}, which stay outside" if plain else ""
            raise CandidateError(
                f"the model has no {_FEWEST} modules of class {name!r} and of one structure that follow each other in "
                f"a ModuleList or Sequential{beside}"
            )
        if any(block._compiled_call_impl is not None for run in runs for block in run):  # noqa: SLF001
            raise CandidateError(f"{step} cannot follow a step that compiled the blocks")
        for run in runs:
            for block, call in zip(run, ScannedRun(run, keep).calls, strict=True):
                program.undo.append(lambda block=block: _set_call(block, None))  # type: ignore[misc]
                _set_call(block, call)
        return program

    def source(self, step: Step) -> str:
        """It has none: the loop and its backward are code of this package.

        Raises:
            CandidateError: Always.
        """
        raise CandidateError(
            f"{step} cannot be written as plain PyTorch: a loop that recomputes its steps is code of this package",
            fix="keep using the plan with kernel_pytorch, or optimise without scan_layers",
        )


def _set_call(block: nn.Module, call: object) -> None:
    block._compiled_call_impl = call  # type: ignore[assignment]  # noqa: SLF001
