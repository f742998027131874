"""The transform that computes attention by chunks of queries (`chunked_attention`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from kernel_pytorch.advanced_memory.chunked_attention import chunked_attention
from kernel_pytorch.attention.follow import Followed
from kernel_pytorch.backends.tpu.autocast import as_autocast
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError

__all__ = ["ChunkedAttention"]

_ROWS = 512


class ChunkedAttention:
    """`rows=N`: attention, called or written out, N queries at a time, its backward from the log-sum-exp."""

    name = "chunked_attention"
    summary = "attention by chunks of queries, where a partitioner splits the step and no kernel can be"
    group = "attention"
    numerics = Numerics.REORDERED
    modes = frozenset({Mode.TRAINING})
    compiles = False

    def probe(self, device: DeviceSpec) -> Skip | None:
        """Kernels are faster wherever one runs."""
        return Skip(
            f"is for steps spread over a TPU slice; on {device.vendor} attention kernels are faster and hold no scores",
            fix="kpt fit searches it",
        )

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """Nothing that a search by speed should try."""
        del workload
        skip = self.probe(device)
        assert skip is not None
        return skip

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """It makes nothing faster."""
        del step, prediction, device
        return 1.0

    def apply(self, program: Program, step: Step) -> Program:
        """Run the model under `Followed`."""
        rows = int(step.params.get("rows", _ROWS))
        if rows < 1:
            raise CandidateError(f"{step}: rows must be 1 or more")
        before = program.call
        program.undo.append(lambda: setattr(program, "call", before))
        program.call = Followed(before, partial(_attend, rows), str(step))
        return program

    def source(self, step: Step) -> str:
        """It has none.

        Raises:
            CandidateError: Always.
        """
        raise CandidateError(
            f"{step} cannot be written as plain PyTorch for a model it has not seen run",
            fix="keep using the plan with kernel_pytorch, or optimise without chunked_attention",
        )


def _attend(  # noqa: PLR0917
    rows: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,  # noqa: FBT001
    scale: float,
) -> torch.Tensor | None:
    query, key, value = as_autocast(query, key, value)
    if query.dim() != 4 or query.dtype != key.dtype or query.dtype != value.dtype or query.shape[:2] != key.shape[:2]:
        return None
    if causal and query.shape[-2] != key.shape[-2]:
        return None
    return chunked_attention(query, key, value, causal=causal, scale=scale, rows=rows)
