"""The transform that spreads a step over the devices of a slice (`shard`)."""

from __future__ import annotations

from collections.abc import Sequence

from kernel_pytorch.advanced_memory.rows_mark import marked
from kernel_pytorch.advanced_memory.scanned import InLoop
from kernel_pytorch.core.blocks import blocks_of
from kernel_pytorch.core.program import plain_call
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError

__all__ = ["PARAMETERS", "Shard"]

PARAMETERS = ("replicated", "sharded")


class Shard:
    """`parameters=replicated|sharded, rows=CLASS, windows=True`: one program for all devices, for the global batch.

    With `rows`, inputs and outputs of the blocks of that class are marked as spread by rows, so that the partitioner
    gathers weights and never activations. Without `windows` a product of a gathered weight is one product: less
    memory, and no overlap with the network. How parameters lie is no part of the traced program, and neither are
    windows: `kpt fit` gives them to the compiler.
    """

    name = "shard"
    summary = "spread the batch, parameters and optimizer state over the devices of a TPU slice"
    group = "shard"
    numerics = Numerics.REORDERED
    modes = frozenset({Mode.INFERENCE, Mode.TRAINING})
    compiles = False

    def probe(self, device: DeviceSpec) -> Skip | None:
        """It is for the compiler of a slice."""
        if device.vendor != "tpu":
            return Skip(f"spreads a step over a TPU slice, and this is {device.vendor}", fix="kpt fit --topology")
        if device.num_devices < 2:
            return Skip("one device has nothing to spread over")
        return Skip(
            "running a program on several TPU chips is not built; kpt fit compiles it for them",
            fix="kpt fit TARGET --topology v5e:4x4 --search",
        )

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """Nothing that could be tried here."""
        del workload
        skip = self.probe(device)
        assert skip is not None
        return skip

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """Unknown."""
        del step, prediction, device
        return float("inf")

    def apply(self, program: Program, step: Step) -> Program:
        """Mark the blocks' inputs and outputs."""
        parameters, name = str(step.params.get("parameters", "")), str(step.params.get("rows", ""))
        if parameters not in PARAMETERS:
            raise CandidateError(f"{step}: parameters must be one of {', '.join(PARAMETERS)}")
        blocks = blocks_of(program.model, name) if name else []
        if name and not blocks:
            raise CandidateError(f"the model has no module of class {name!r}")
        if any(isinstance(block._compiled_call_impl, InLoop) for block in blocks):  # noqa: SLF001
            raise CandidateError(f"{step} marks what each block takes, and a loop over them (scan_layers) calls none")
        for block in blocks:
            before = block._compiled_call_impl  # noqa: SLF001
            program.undo.append(lambda b=block, c=before: setattr(b, "_compiled_call_impl", c))  # type: ignore[misc]
            block._compiled_call_impl = marked(before or plain_call(block))  # noqa: SLF001
        return program

    def source(self, step: Step) -> str:
        """It has none.

        Raises:
            CandidateError: Always.
        """
        raise CandidateError(f"{step} cannot be written as plain PyTorch: it annotates the compiled program")
