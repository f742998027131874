"""What is known of a workload before anything is tried: its description, and what could help by how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kernel_pytorch.backends.placement import release_cached
from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.describe import check_model, describe
from kernel_pytorch.core.program import clone_model
from kernel_pytorch.core.protocols import HardwareManager, Transform
from kernel_pytorch.core.types import Prediction, WorkloadSpec
from kernel_pytorch.core.workload import Workload
from kernel_pytorch.search.bench import Bench, prepare_bench
from kernel_pytorch.search.predict import predict
from kernel_pytorch.search.propose import Proposals, propose

__all__ = ["Survey", "described", "predicted", "survey"]


@dataclass(frozen=True, slots=True)
class Survey:
    """A workload, described, and what was measured of it."""

    workload: WorkloadSpec
    prediction: Prediction


def described(
    workload: Workload, config: KernelPyTorchConfig, manager: HardwareManager, transforms: Sequence[Transform]
) -> tuple[Bench, WorkloadSpec]:
    """Build the unmodified model on the device, check that it can be compared with, and describe it.

    Raises:
        KptError: The model raises on its inputs, or gives NaN.
    """
    bench = prepare_bench(workload, config, manager, seed=config.seed, transforms=transforms)
    check_model(bench.workload, bench.model, bench.calls, bench.config.mode, bench.batches)
    return bench, describe(workload, bench.model, bench.calls, config.mode, bench.batches)


def predicted(bench: Bench, spec: WorkloadSpec) -> tuple[Prediction, Proposals]:
    """Ask the transforms for proposals, and measure a copy of the unmodified model to bound what they can gain."""
    device = bench.manager.spec
    proposals = propose(bench.transforms, spec, device, bench.config)
    model = clone_model(bench.model)
    prediction = predict(
        bench.workload,
        model,
        bench.calls,
        spec,
        device,
        bench.manager,
        bench.transforms,
        proposals.singles,
    )
    del model
    release_cached()
    return prediction, proposals


def survey(
    workload: Workload, config: KernelPyTorchConfig, manager: HardwareManager, transforms: Sequence[Transform]
) -> Survey:
    """Describe and predict in one go: what a worker does for a device that only one process can have."""
    bench, spec = described(workload, config, manager, transforms)
    return Survey(spec, predicted(bench, spec)[0])
