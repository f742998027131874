"""int8 linear layers without a compiler, by the kernels of PyTorch's own dynamic quantisation (fbgemm, oneDNN)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.ceilings import bounded, rate
from kernel_pytorch.transforms.linear_swap import packable_linears, packed_call, swap_linears
from kernel_pytorch.transforms.plain_source import plain_source
from kernel_pytorch.transforms.traceable import Untraceable

__all__ = ["Int8Eager", "per_channel", "per_tensor"]


def per_tensor(linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a call as `torch.ao.quantization.quantize_dynamic` makes it: one scale a weight, reduced range.

    That function replaces the modules, and with them the `state_dict` keys; the arithmetic is the same.
    """
    import warnings

    weight = linear.weight.detach().float()
    scale = float(weight.abs().max().clamp_min(1e-12)) / 127.5
    bias = None if linear.bias is None else linear.bias.detach().float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the packed kernels take only the older quantised tensors
        packed = torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(weight, scale, 0, torch.qint8), bias)
    return lambda x: torch.ops.quantized.linear_dynamic(x.float(), packed, reduce_range=True).to(x.dtype)


def per_channel(linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a call with one scale for each output channel, and all eight bits of the inputs where that is safe.

    Without VNNI, sums of two products saturate at 16 bits: seven bits then (relative error 0.14 with eight, AVX2).
    """
    import warnings

    reduced = not torch.cpu._is_vnni_supported()  # noqa: SLF001  # PyTorch has no public name for it

    weight = linear.weight.detach().float()
    scales = (weight.abs().amax(1).clamp_min(1e-12) / 127.5).double()
    zeros = torch.zeros(len(scales), dtype=torch.long)
    bias = None if linear.bias is None else linear.bias.detach().float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the packed kernels take only the older quantised tensors
        quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(quantised, bias)
    return lambda x: torch.ops.quantized.linear_dynamic(x.float(), packed, reduce_range=reduced).to(x.dtype)


_PACK = {"channel": per_channel, "tensor": per_tensor}


class Int8Eager:
    """`scales=channel|tensor`; the parameters stay what they are, so a checkpoint loads and the weights stay float.

    `tensor` is PyTorch's own default: it is tried because many use it, and all-MiniLM-L6-v2 shows why not to (relative
    error 0.5).
    """

    name = "int8_eager"
    summary = "int8 linear layers by PyTorch's dynamic quantisation, without a compiler"
    group = "weights"
    numerics = Numerics.LOWER_PRECISION
    modes = frozenset({Mode.INFERENCE})
    compiles = False
    tries_late = True
    """Of twenty such trials in this project's own results, twenty were beyond the accuracy budget or failed."""

    def probe(self, device: DeviceSpec) -> Skip | None:
        """A CPU with a quantised engine is needed."""
        if device.vendor != "cpu":
            return Skip("PyTorch's eager int8 kernels are for CPUs")
        engines = {"x86", "fbgemm", "onednn", "qnnpack"} & set(torch.backends.quantized.supported_engines)
        return None if engines else Skip("this PyTorch is built without a quantised engine")

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """Scales by channel first."""
        skip = self.probe(device)
        if skip is not None:
            return skip
        if workload.mode is Mode.TRAINING:
            return Skip("int8 linear layers have no gradient")
        if "Linear" not in workload.modules:
            return Skip("the model has no nn.Linear")
        return [Step(self.name, {"scales": "channel"}), Step(self.name, {"scales": "tensor"})]

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """Matrix products gain the ratio of peak rates where it is known, else may vanish."""
        del step
        old, new = rate(device, "float32"), rate(device, "int8")
        return bounded(prediction, {"matmul": old / new * 0.5 if old and new else 0.0})

    def apply(self, program: Program, step: Step) -> Program:
        """Put a packed call into the slot of each linear layer."""
        pack = _PACK.get(str(step.params.get("scales", "")))
        if pack is None:
            raise CandidateError(f"unknown scales of {step}; expected channel or tensor")
        count = swap_linears(program, pack)
        program.holds.append(Untraceable(step, "PyTorch's packed int8 weights cannot be traced"))
        program.notes.append(f"{count} linear layers run in int8; their float weights stay in memory")
        return program

    def source(self, step: Step) -> str:
        """The same functions over the linear layers."""
        pack = _PACK[str(step.params["scales"])]
        then = "for _linear in packable_linears(model):\n    "
        then += f"_linear._compiled_call_impl = packed_call(_linear, {pack.__name__})"
        return plain_source(packable_linears, packed_call, pack, then=then)
