"""Attention by TorchTPU's splash kernel in both directions, whether a model calls it or writes it out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from kernel_pytorch.attention.follow import Followed
from kernel_pytorch.backends.tpu.autocast import as_autocast
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.ceilings import bounded

__all__ = ["SplashAttention"]

_LANES = 128
"""Rows of attention come in blocks of the vector unit's lanes."""


class SplashAttention:
    """`pad=N`: scaled dot-product attention by the operator that TorchTPU lowers to splash kernels, both directions.

    Called plainly, a compiled step takes the splash kernel forward and holds all scores in the backward. Followed is
    attention without a mask or with the causal one, without dropout.

    With `pad`, heads whose width is no multiple of N get columns of zeros up to the next one: scores are the same sums
    with zeros added, their scale stays that of the model's width, and the result's columns beyond it are cut off. The
    kernels take no values wider than 128 columns whose width is no multiple of 128 (160, 192; TorchTPU 0.2.0 ends the
    process at them); padded they do.
    """

    name = "splash_attention"
    summary = "attention by TorchTPU's splash kernels, also where the model writes it out"
    group = "attention"
    numerics = Numerics.REORDERED
    modes = frozenset({Mode.INFERENCE, Mode.TRAINING})
    compiles = False

    def probe(self, device: DeviceSpec) -> Skip | None:
        """The kernels are Mosaic code: a TPU's compiler takes them, and no CPU runs them."""
        if device.vendor != "tpu":
            return Skip(f"splash kernels run on TPUs, not on {device.vendor}")
        if "emulated" in device.features:
            return Skip("splash kernels are Mosaic code, which only a TPU runs; this one is emulated on the CPU")
        return None

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """Heads as they are, then padded to the lanes; whether the model has such attention shows when it runs."""
        skip = self.probe(device)
        if skip is not None:
            return skip
        if not any("softmax" in name or "attention" in name for name in workload.operators):
            return Skip("the workload computes no attention")
        return [Step(self.name), Step(self.name, {"pad": _LANES})]

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """Attention and what surrounds a written-out one may cost nothing."""
        del step, device
        return bounded(prediction, dict.fromkeys(("attention", "reduction", "elementwise", "copy"), 0.0))

    def apply(self, program: Program, step: Step) -> Program:
        """Run the model under `Followed`."""
        pad = int(step.params.get("pad", 0))
        if "pad" in step.params and pad < 1:
            raise CandidateError(f"{step}: pad must be 1 or more")
        before = program.call
        program.undo.append(lambda: setattr(program, "call", before))
        program.call = _Attended(before, pad, str(step))
        return program

    def source(self, step: Step) -> str:
        """It has none.

        Raises:
            CandidateError: Always.
        """
        raise CandidateError(
            f"{step} cannot be written as plain PyTorch for a model it has not seen run",
            fix="keep using the plan with kernel_pytorch, or optimise without splash_attention",
        )


class _Attended:
    """A call whose attention goes to the kernels, some of it padded where that is asked for."""

    def __init__(self, call: Callable[..., Any], pad: int, name: str) -> None:
        self.pad = pad
        self.name = name
        self.padded = 0
        self.call = Followed(call, self.attend, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.padded = 0
        result = self.call(*args, **kwargs)
        if self.pad and not self.padded:
            raise CandidateError(f"{self.name}: the heads' widths are multiples of {self.pad} already")
        return result

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        causal: bool,  # noqa: FBT001
        scale: float,
    ) -> torch.Tensor | None:
        """Return attention of `[batch, heads, rows, width]`; `None` for shapes the kernel does not take."""
        query, key, value = as_autocast(query, key, value)
        if query.dim() != 4 or query.dtype != key.dtype or query.dtype != value.dtype:
            return None
        if query.shape[-2] % _LANES or key.shape[-2] % _LANES or query.shape[:2] != key.shape[:2]:
            return None
        if causal and query.shape[-2] != key.shape[-2]:
            return None
        width = value.shape[-1]
        if self.pad and any(t.shape[-1] % self.pad for t in (query, value)):
            self.padded += 1
            query, key, value = (functional.pad(t, (0, -t.shape[-1] % self.pad)) for t in (query, key, value))
        if value.shape[-1] > _LANES and value.shape[-1] % _LANES:
            return None
        return _kernel(query, key, value, causal, scale)[..., :width]


def _kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,  # noqa: FBT001
    scale: float,
) -> torch.Tensor:
    with_lse, debug = True, False
    result: torch.Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(  # noqa: SLF001
        query, key, value, None, with_lse, 0.0, causal, debug, scale=scale
    )[0]
    return result
