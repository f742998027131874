"""Reorder the weights of linear layers once, as oneDNN wants them, instead of at each call."""
# ruff: noqa: SLF001 - the operators Inductor itself packs with

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.transforms.ceilings import bounded, roofline
from kernel_pytorch.transforms.linear_swap import packable_linears, packed_call, swap_linears
from kernel_pytorch.transforms.plain_source import plain_source
from kernel_pytorch.transforms.traceable import Untraceable

__all__ = ["Prepack", "prepacked"]


def prepacked(linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a call of a linear layer on its weight in oneDNN's blocked layout."""
    weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
    bias = None if linear.bias is None else linear.bias.detach()
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Prepack:
    """oneDNN weight prepacking without a compiler; `compile(freezing=True)` does it in generated code.

    Measured on an AMD EPYC core, 2048 x 384 by 384 x 1536: float32 22.7 ms by MKL, 10.1 ms prepacked by oneDNN;
    bfloat16 5.7 and 4.9 ms.
    """

    name = "prepack"
    summary = "store linear weights in oneDNN's blocked layout"
    group = "weights"
    numerics = Numerics.REORDERED
    modes = frozenset({Mode.INFERENCE})
    compiles = False

    def probe(self, device: DeviceSpec) -> Skip | None:
        """OneDNN is needed, on a CPU."""
        if device.vendor != "cpu":
            return Skip("oneDNN prepacking is for CPUs")
        available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        if not available or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
            return Skip("this PyTorch is built without oneDNN", fix="install a PyTorch wheel from PyPI")
        return None

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """For models with linear layers."""
        skip = self.probe(device)
        if skip is not None:
            return skip
        if workload.mode is Mode.TRAINING:
            return Skip("weights change at each training step")
        return [Step(self.name)] if "Linear" in workload.modules else Skip("the model has no nn.Linear")

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """Matrix products may reach the peak rate."""
        del step
        matmul = (s for s in prediction.shares if s.kind == "matmul")
        return bounded(prediction, {s.kind: roofline(s, prediction, device, "float32") for s in matmul})

    def apply(self, program: Program, step: Step) -> Program:
        """Put a packed call into the slot of each linear layer."""
        swap_linears(program, prepacked)
        program.holds.append(Untraceable(step, "oneDNN's packed weights cannot be traced; compile(freezing) packs too"))
        return program

    def source(self, step: Step) -> str:
        """The same functions over the linear layers."""
        del step
        then = "for _linear in packable_linears(model):\n    "
        then += "_linear._compiled_call_impl = packed_call(_linear, prepacked)"
        return plain_source(packable_linears, packed_call, prepacked, then=then)
