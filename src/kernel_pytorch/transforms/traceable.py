"""Which programs cannot be traced into a graph, so that what must trace refuses them in words."""

from __future__ import annotations

from dataclasses import dataclass

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import Step
from kernel_pytorch.errors import CandidateError

__all__ = ["Untraceable", "refuse_untraceable"]


@dataclass(frozen=True, slots=True)
class Untraceable:
    """A mark in `Program.holds`: an earlier step put in what Dynamo cannot trace."""

    step: Step
    reason: str


def refuse_untraceable(program: Program, step: Step) -> None:
    """Raise where an earlier step cannot be traced.

    Raises:
        CandidateError: It cannot, with the reason.
    """
    for mark in program.holds:
        if isinstance(mark, Untraceable):
            raise CandidateError(f"{step} cannot follow {mark.step}: {mark.reason}")
