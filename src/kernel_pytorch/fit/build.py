"""A target as a program to trace: built without memory where the model allows it, its batch as large as asked for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from kernel_pytorch.catalog import TRANSFORMS, apply_candidate
from kernel_pytorch.core.describe import make_optimizer, training_loss
from kernel_pytorch.core.program import begin
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.targets import load_target
from kernel_pytorch.core.types import Candidate, Mode
from kernel_pytorch.core.workload import Workload, as_call, as_tree
from kernel_pytorch.errors import InputsError

__all__ = ["Build", "batch_size", "with_batch_size"]


@dataclass(frozen=True, slots=True)
class Build:
    """Builds a program and its batch; pickles, so that a child can.

    Attributes:
        target: What `load_target` takes, or a workload.
        mode: Inference or training.
        case: Which of the workload's cases; the first by default.
        batch: Size of the first dimension of the inputs; as the workload has it by default.
        candidate: Steps that are applied to the program.
        trust_remote_code: As `load_target` takes it.
        real: Build the model in memory at once, with its values.
    """

    target: str | Workload
    mode: Mode = Mode.TRAINING
    case: str | None = None
    batch: int | None = None
    candidate: Candidate = field(default_factory=Candidate)
    trust_remote_code: bool = False
    real: bool = False

    def __call__(self) -> tuple[Program, Any]:
        """Return the program and its batch, on `meta` where the model can be built there.

        Raises:
            KptError: The target, the model or the inputs are wrong, or a step does not apply.
        """
        if not self.real:
            try:
                with torch.device("meta"):
                    return self._build()
            except Exception:  # noqa: BLE001  a model may read values while it is built: then it is built with them
                return replace(self, real=True)()
        return self._build()

    def _build(self) -> tuple[Program, Any]:
        workload = self.target
        if isinstance(workload, str):
            workload = load_target(workload, trust_remote_code=self.trust_remote_code)
        case = self._case(workload)
        batch = workload.batch(case, 0)
        if self.batch is not None:
            batch = with_batch_size(batch, self.batch)
        training = self.mode is Mode.TRAINING
        model = workload.model().train(training)
        program = begin(
            model,
            self.mode,
            {case: as_call(batch)} if not training else {},
            optimizer=make_optimizer(workload, model.parameters()) if training else None,
            loss=training_loss(workload) if training else None,
        )
        return apply_candidate(program, self.candidate, TRANSFORMS), batch

    def _case(self, workload: Workload) -> str:
        if self.case is None:
            return next(iter(workload.cases))
        if self.case not in workload.cases:
            raise InputsError(f"no case {self.case!r}; the workload has {', '.join(workload.cases)}")
        return self.case


def batch_size(batch: Any) -> int:
    """Return the size of the first dimension of the first input that has one.

    Raises:
        InputsError: No input has a dimension.
    """
    for leaf in pytree.tree_leaves(as_call(batch).args + tuple(as_call(batch).kwargs.values())):
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    raise InputsError("the inputs have no batch dimension: no tensor among them has a dimension")


def with_batch_size(batch: Any, size: int) -> Any:
    """Return inputs of another batch size: every tensor whose first dimension is the batch size gets the new one.

    Values repeat those of the first example; only shapes matter to a trace.

    Raises:
        InputsError: The size is below one, or the inputs have no batch dimension.
    """
    if size < 1:
        raise InputsError(f"a batch of {size}: there is nothing to run", fix="--batch 1 or more")
    before = batch_size(batch)

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0 or leaf.shape[0] != before:
            return leaf
        if leaf.is_meta or before == 0:
            return leaf.new_empty((size, *leaf.shape[1:]))
        return leaf[torch.arange(size) % before]

    tree, close = as_tree(batch)
    return close(pytree.tree_map(resized, tree))
