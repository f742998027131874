"""Run the matrix products of `nn.Linear` by measured algorithms of cuBLASLt (`ops.linear`): the modules stay.

Layers that an earlier step lets run in FP8 with one scale a tensor have their products measured in FP8.

`forward` is set on the instance, for Dynamo does not look into the slot of `nn.Module.compile` of an inner module.
Pickling drops it; `copy.deepcopy` binds it to the copy.
"""

from __future__ import annotations

import types
from collections.abc import Sequence

import torch
from torch import nn

from kernel_pytorch.backends.nvidia import cublaslt
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.ops.linear import linear
from kernel_pytorch.precision.site import Site
from kernel_pytorch.precision.state import named_sites
from kernel_pytorch.transforms.ceilings import bounded

__all__ = ["LinearAlgorithm"]

_LEAST = 0.8
"""Share of their time that products keep at least. Most seen on an H200: 0.83, of a product of 0.2 ms."""


class LinearAlgorithm:
    """`choice=measured`: each product by what was fastest at its shape on this GPU, PyTorch's own choice included."""

    name = "linear_algorithm"
    summary = "run the matrix products of linear layers by measured algorithms of cuBLASLt"
    group = "linear"
    numerics = Numerics.REORDERED
    modes = frozenset({Mode.INFERENCE, Mode.TRAINING})
    compiles = False
    pays_in_sum = True
    """Under its limit of power a GPU gains by products that need less energy, and it is there in fast steps only."""

    def probe(self, device: DeviceSpec) -> Skip | None:
        """The library is NVIDIA's."""
        return cublaslt.unavailable() if device.vendor == "nvidia" else Skip("cuBLASLt needs an NVIDIA GPU")

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """One step, for models that are in a 16-bit format."""
        skip = self.probe(device)
        if skip is not None:
            return skip
        if "Linear" not in workload.modules:
            return Skip("the model has no nn.Linear")
        if not any(str(dtype).removeprefix("torch.") in workload.dtypes for dtype in cublaslt.DTYPES):
            return Skip(
                f"the model is in {workload.dtypes[0] if workload.dtypes else 'no format'}, products take 16 bits"
            )
        return [Step(self.name, {"choice": "measured"})]

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """Products may take a fifth less."""
        del step, device
        return bounded(prediction, {"matmul": _LEAST})

    def apply(self, program: Program, step: Step) -> Program:
        """Give every plain linear layer of a 16-bit format a `forward` that calls `ops.linear`.

        Raises:
            CandidateError: There is none.
        """
        if step.params.get("choice") != "measured":
            raise CandidateError(f"{step}: choice must be measured")
        found = [m for m in program.model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
        sites = [s for s, _ in named_sites(program.model).values() if not (s.measured or s.recipe.by_row)]
        if not found and not sites:
            raise CandidateError(f"{step}: the model has no plain nn.Linear")
        _measure_products(sites, on=True)
        program.undo.append(lambda: _measure_products(sites, on=False))
        if sites:
            program.notes.append(f"measured products in FP8: {sum(len(site.layers) for site in sites)} layers")
        swapped = [m for m in found if m.weight.dtype in cublaslt.DTYPES]
        # In float32 and float64 they keep PyTorch's products: what validates there judges what surrounds them.
        for module in swapped:
            module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
        program.undo.append(lambda: _restore(swapped))
        if swapped:
            program.notes.append(f"measured products: {len(swapped)} x nn.Linear")
        return program

    def source(self, step: Step) -> str:
        """It has none: PyTorch offers no choice of algorithms.

        Raises:
            CandidateError: Always.
        """
        raise CandidateError(
            f"{step} cannot be written as plain PyTorch, which always takes cuBLASLt's first algorithm",
            fix="keep using the plan with kernel_pytorch, or optimise without linear_algorithm",
        )


def forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    """Multiply by the measured algorithm. Named as what it replaces: unpickling then finds the class's own."""
    return linear(input, self.weight, self.bias)


def _measure_products(sites: Sequence[Site], *, on: bool) -> None:
    for site in sites:
        site.measured = on


def _restore(modules: list[nn.Linear]) -> None:
    for module in modules:
        vars(module).pop("forward", None)
