"""Run the unmodified model a few times and count: time, where it goes, operations, bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from kernel_pytorch.core.describe import make_optimizer, training_loss
from kernel_pytorch.core.program import clone_call
from kernel_pytorch.core.protocols import HardwareManager
from kernel_pytorch.core.types import Mode
from kernel_pytorch.core.workload import Call, Workload
from kernel_pytorch.search.operators import WorkCounter, least_bytes
from kernel_pytorch.search.profile import estimated_shares, time_shares

__all__ = ["CaseFigures", "Unmodified"]

_TIMING_S = 0.8
_LEAST_RUNS = 3
_MOST_RUNS = 15


@dataclass(frozen=True, slots=True)
class CaseFigures:
    """What was counted of one case.

    Attributes:
        weight: Share of the work this case stands for.
        ms: Median time of a call, or of a training step.
        shares: Share of the time by class of operators; sums to one.
        counter: Calls, operations and bytes by class.
        least_bytes: Least bytes any implementation moves.
    """

    weight: float
    ms: float
    shares: Mapping[str, float]
    counter: WorkCounter
    least_bytes: float


@dataclass(frozen=True, slots=True)
class Unmodified:
    """The unmodified model on the device: a copy that may be run, and in training trained."""

    workload: Workload
    model: nn.Module
    calls: Mapping[str, Call]
    mode: Mode
    manager: HardwareManager

    def figures(self, case: str, weight: float) -> CaseFigures:
        """Run one case: once to warm up, once counted, a few times timed, once profiled."""
        step, optimizer = self._step(case)
        counter = WorkCounter()
        step()
        with counter, _optimizer_apart(optimizer, counter):
            result = step()
        return CaseFigures(
            weight=weight,
            ms=_median_ms(self.manager, step),
            shares=self._shares(step, counter),
            counter=counter,
            least_bytes=self._least_bytes(case, counter, result, optimizer),
        )

    def _shares(self, step: Callable[[], Any], counter: WorkCounter) -> Mapping[str, float]:
        if self.manager.vendor == "tpu":
            return estimated_shares(counter, self.manager.spec)
        return time_shares(step, self.manager.synchronize, self.manager.vendor)

    def _step(self, case: str) -> tuple[Callable[[], Any], torch.optim.Optimizer | None]:
        model = self.model
        if self.mode is Mode.INFERENCE:
            call = clone_call(self.manager.place(self.calls[case]))  # a model may write to its inputs

            def infer() -> Any:
                with torch.no_grad():
                    return model(*call.args, **call.kwargs)

            return infer, None
        batch = self.manager.place(self.workload.batch(case, 0))
        loss, optimizer = training_loss(self.workload), make_optimizer(self.workload, model.parameters())

        def train() -> Any:
            optimizer.zero_grad(set_to_none=True)
            value: Any = loss(model, batch)
            value.backward()
            optimizer.step()
            return value.detach()

        return train, optimizer

    def _least_bytes(
        self, case: str, counter: WorkCounter, result: Any, optimizer: torch.optim.Optimizer | None
    ) -> float:
        """Return the bytes of parameters, buffers, inputs and outputs once.

        In training also what the optimizer writes, and its state read and written.
        """
        call = self.calls[case]
        least = least_bytes((*self.model.parameters(), *self.model.buffers()), counter)
        least += _bytes(result) + _bytes((call.args, dict(call.kwargs)))
        if optimizer is not None:
            trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            least += _bytes(trained) + 2 * _bytes([dict(state) for state in optimizer.state.values()])
        return least


@contextmanager
def _optimizer_apart(optimizer: torch.optim.Optimizer | None, counter: WorkCounter) -> Iterator[None]:
    """Count what happens in the optimizer's step as its own class."""
    if optimizer is None:
        yield
        return

    def begin(*_: Any) -> None:
        counter.section = "optimizer"

    def end(*_: Any) -> None:
        counter.section = ""

    hooks = optimizer.register_step_pre_hook(begin), optimizer.register_step_post_hook(end)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _median_ms(manager: HardwareManager, step: Callable[[], Any]) -> float:
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < _LEAST_RUNS or (len(times) < _MOST_RUNS and time.perf_counter() - start < _TIMING_S):
        times.append(manager.time_ms(step))
    return statistics.median(times)


def _bytes(tree: Any) -> float:
    leaves = pytree.tree_leaves(tree)
    return float(sum(t.numel() * t.element_size() for t in leaves if isinstance(t, torch.Tensor)))
