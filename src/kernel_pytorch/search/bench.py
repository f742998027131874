"""The unmodified model on the device with its inputs: what every candidate is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kernel_pytorch.catalog import TRANSFORMS, apply_candidate
from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.describe import make_optimizer, training_loss
from kernel_pytorch.core.program import begin, clone_model
from kernel_pytorch.core.protocols import HardwareManager, Program, Transform
from kernel_pytorch.core.types import Candidate, Mode
from kernel_pytorch.core.workload import Call, Workload

__all__ = ["Bench", "build", "prepare_bench"]

_SEED_OF_WEIGHTS = 0


@dataclass(slots=True)
class Bench:
    """The unmodified model on the device, ready to be compared with candidates.

    Attributes:
        model: The unmodified model, in the mode of the workload.
        calls: Inputs by case; in training, what the model is called with inside the loss is not known, and these
            are the batches.
        batches: What the input factories returned, placed; what a loss takes.
    """

    workload: Workload
    config: KernelPyTorchConfig
    manager: HardwareManager
    model: nn.Module
    calls: Mapping[str, Call]
    batches: Mapping[str, Any]
    transforms: Sequence[Transform] = field(default=TRANSFORMS)

    @property
    def training(self) -> bool:
        """Whether whole training steps are the workload."""
        return self.config.mode is Mode.TRAINING

    def loss(self) -> Callable[[Any, Any], torch.Tensor] | None:
        """Return the training loss; `None` in inference."""
        return training_loss(self.workload) if self.training else None

    def step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        case: str,
        loss: Callable[[Any, Any], torch.Tensor] | None = None,
    ) -> Callable[[], Any]:
        """Return a function that runs one call, or one whole training step (of `loss`, if given), of a case."""
        if not self.training:
            call = self.calls[case]

            def infer() -> Any:
                with torch.no_grad():
                    return model(*call.args, **call.kwargs)

            return infer
        loss, batch = loss or training_loss(self.workload), self.batches[case]
        assert optimizer is not None

        def train() -> Any:
            optimizer.zero_grad(set_to_none=True)
            value = loss(model, batch)
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return value

        return train


def prepare_bench(
    workload: Workload,
    config: KernelPyTorchConfig,
    manager: HardwareManager,
    *,
    seed: int,
    transforms: Sequence[Transform] = TRANSFORMS,
) -> Bench:
    """Build the unmodified model and its inputs on the device.

    The factory runs under one seed, so that a model with random weights has the same ones in every trial.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED_OF_WEIGHTS)
        model = workload.model()
    if workload.shares_model or not workload.target:
        model = clone_model(model)  # it is the user's own object: never run what could change it
    model = manager.place(model)
    model.train(config.mode is Mode.TRAINING)
    batches = {name: manager.place(workload.batch(name, seed)) for name in workload.cases}
    calls = {name: manager.place(workload.call(name, seed)) for name in workload.cases}
    return Bench(workload, config, manager, model, calls, batches, transforms)


def build(bench: Bench, model: nn.Module, candidate: Candidate, calls: Mapping[str, Call] | None = None) -> Program:
    """Apply a candidate to a model (in place) and return the program, not yet shipped."""
    optimizer = make_optimizer(bench.workload, model.parameters()) if bench.training else None
    program = begin(
        model,
        bench.config.mode,
        bench.calls if calls is None else calls,
        optimizer=optimizer,
        loss=bench.loss(),
    )
    return apply_candidate(program, candidate, bench.transforms)
