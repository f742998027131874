"""Lay images out with channels last, as convolution kernels want them; outputs come back contiguous."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.transforms.ceilings import FUSIBLE, bounded, roofline
from kernel_pytorch.transforms.plain_source import plain_source
from kernel_pytorch.transforms.trees import map_tensors

__all__ = ["ChannelsLast", "lay_out", "with_layout"]

_CONVOLUTIONS = ("Conv2d", "Conv3d", "ConvTranspose2d", "ConvTranspose3d")


def lay_out(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of 4 or 5 dimensions with channels last; any other as it is."""
    if tensor.layout is not torch.strided or tensor.dim() not in (4, 5):
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d)


def with_layout(inner: Callable[..., Any]) -> Callable[..., Any]:
    """Return `inner` with inputs laid out channels last, and outputs of 4 or 5 dimensions made contiguous again."""

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = map_tensors((args, kwargs), lay_out)
        return map_tensors(inner(*args, **kwargs), lambda t: t.contiguous() if t.dim() in (4, 5) else t)

    return run


class ChannelsLast:
    """Memory format `channels_last` (2d) and `channels_last_3d`."""

    name = "channels_last"
    summary = "lay images out with channels last"
    group = "layout"
    numerics = Numerics.REORDERED
    modes = frozenset({Mode.INFERENCE, Mode.TRAINING})
    compiles = False

    def probe(self, device: DeviceSpec) -> Skip | None:
        """Runs on every device that takes strides as they are."""
        return Skip("on a TPU the compiler chooses the layout of every array") if device.vendor == "tpu" else None

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:  # noqa: ARG002
        """For models with 2d or 3d convolutions."""
        if any("convolution" in op or "conv2d" in op or "conv3d" in op for op in workload.operators) or any(
            name in workload.modules for name in _CONVOLUTIONS
        ):
            images = [s for case in workload.signatures.values() for s in case if len(s.shape) in (4, 5)]
            if images or any(name in workload.modules for name in _CONVOLUTIONS):
                return [Step(self.name)]
        return Skip("the model has no 2d or 3d convolutions")

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """Convolutions may reach the peak rate; copies, and half of what moves bytes, may vanish."""
        del step
        remaining = dict.fromkeys(FUSIBLE - {"overhead", "embedding"}, 0.5) | {"copy": 0.0}
        for share in prediction.shares:
            if share.kind == "convolution":
                remaining[share.kind] = roofline(share, prediction, device, "float32")
        return bounded(prediction, remaining)

    def apply(self, program: Program, step: Step) -> Program:
        """Lay out the weights of convolutions in place, and the inputs at each call."""
        del step
        changed = []
        for tensor in weights_of(program.model):
            changed.append((tensor, tensor.stride()))
            tensor.data = lay_out(tensor.data)

        def undo() -> None:
            for tensor, stride in changed:
                # The values are those of now: training may have changed them.
                plain = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
                tensor.data = plain.copy_(tensor.data)

        program.undo.append(undo)
        program.call = with_layout(program.call)
        return program

    def source(self, step: Step) -> str:
        """`model.to(memory_format=...)` by weight, and the wrapper."""
        del step
        then = "for _weight in weights_of(model):\n    _weight.data = lay_out(_weight.data)\ncall = with_layout(call)"
        return plain_source(map_tensors, lay_out, weights_of, with_layout, then=then)


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    """Return the weights of 2d and 3d convolutions."""
    kinds = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return [m.weight for m in model.modules() if isinstance(m, kinds) and "weight" in m._parameters]  # noqa: SLF001
