"""Run calls on fewer threads than cores: small models lose more to waking threads than they gain from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.plain_source import plain_source
from kernel_pytorch.transforms.scoped import Scoped, scoped

__all__ = ["Threads", "threads"]


def threads(count: int) -> Callable[[], AbstractContextManager[None]]:
    """Return a setting under which PyTorch uses `count` threads within an operation."""

    @contextmanager
    def setting() -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    return setting


class Threads:
    """`count=n` threads during the call; the process's own number before and after."""

    name = "threads"
    summary = "run on another number of CPU threads"
    group = "threads"
    numerics = Numerics.REORDERED
    modes = frozenset({Mode.INFERENCE})
    """The backward pass runs outside the call, so a training step would change threads half way."""
    compiles = False

    def probe(self, device: DeviceSpec) -> Skip | None:
        """More than one core is needed for a choice."""
        if device.vendor != "cpu":
            return Skip("threads are a matter of the CPU; the model runs on another device")
        return Skip("one core: there is one choice") if device.num_devices < 2 else None

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """One thread, and halves of the cores; the present number is the baseline and is left out."""
        skip = self.probe(device)
        if skip is not None:
            return skip
        if workload.mode is Mode.TRAINING:
            return Skip("a plan cannot set the threads of the backward pass", fix="OMP_NUM_THREADS=n for the process")
        counts, count = {1, device.num_devices}, device.num_devices // 2
        while count > 1:
            counts.add(count)
            count //= 2
        counts.discard(torch.get_num_threads())
        return [Step(self.name, {"count": n}) for n in sorted(counts, reverse=True)]

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """Nothing but the roofline bounds what waking threads costs."""
        del step, device
        return prediction.baseline_ms / prediction.floor_ms if prediction.floor_ms > 0 else float("inf")

    def apply(self, program: Program, step: Step) -> Program:
        """Set the number around the call."""
        count = int(step.params.get("count", 0))
        if count < 1:
            raise CandidateError(f"count of {step} must be 1 or more")
        program.call = Scoped(program.call, threads(count))
        return program

    def source(self, step: Step) -> str:
        """The setting around the call."""
        return plain_source(
            threads, scoped,
            then=f"call = scoped(call, threads({step.params['count']}))",
        )  # fmt: skip
