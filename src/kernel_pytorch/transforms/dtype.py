"""Run the model in bfloat16 or float16, or multiply float32 matrices in TF32; inputs and outputs keep their dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.ceilings import COMPUTE, bounded, rate, roofline
from kernel_pytorch.transforms.plain_source import plain_source
from kernel_pytorch.transforms.scoped import Scoped, scoped
from kernel_pytorch.transforms.trees import map_tensors

__all__ = ["Dtype", "autocast", "cast", "cast_parameters", "main_dtype"]

_FAST_ON_CPU = {"bfloat16": ("avx512_bf16", "amx_bf16"), "float16": ("avx512_fp16", "amx_fp16")}


def main_dtype(model: nn.Module) -> torch.dtype:
    """Return the floating dtype that most parameter bytes have; float32 without such parameters."""
    total: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            total[parameter.dtype] = total.get(parameter.dtype, 0) + parameter.numel() * parameter.element_size()
    return max(total, key=lambda dtype: total[dtype], default=torch.float32)


def cast_parameters(model: nn.Module, to: torch.dtype, back: torch.dtype) -> list[tuple[Any, Any, int]]:
    """Convert parameters and buffers of dtype `back` in place; return (tensor, what it held, version) of each.

    Rotary frequencies (`inv_freq`) keep their precision, as transformers does, and so do the modules a Hugging Face
    model lists as needing it. The parameters stay the same objects, so ties survive.
    """
    precious = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if to is torch.float16:
        precious += tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    changed = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        path = name.split(".")
        if tensor.dtype is not back or path[-1].endswith("inv_freq") or any(part in path for part in precious):
            continue
        changed.append((tensor, tensor.data, tensor._version))  # noqa: SLF001
        tensor.data = tensor.data.to(to)
    return changed


def cast(inner: Callable[..., Any], to: torch.dtype, back: torch.dtype) -> Callable[..., Any]:
    """Return `inner` with tensors of dtype `back` cast to `to` on the way in, and back on the way out."""

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = map_tensors((args, kwargs), lambda t: t.to(to) if t.dtype is back else t)
        return map_tensors(inner(*args, **kwargs), lambda t: t.to(back) if t.dtype is to else t)

    return run


def autocast(inner: Callable[..., Any], device: str, to: torch.dtype, back: torch.dtype) -> Callable[..., Any]:
    """Return `inner` under autocast, with outputs of dtype `to` cast to `back`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype=to):
            out = inner(*args, **kwargs)
        return map_tensors(out, lambda t: t.to(back) if t.dtype is to else t)

    return run


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Dtype:
    """Another number format: `to=bfloat16|float16` with `how=cast|autocast`, or `to=tf32`."""

    name = "dtype"
    summary = "run in bfloat16, float16 or TF32; inputs and outputs keep their dtypes"
    group = "precision"
    numerics = Numerics.LOWER_PRECISION
    modes = frozenset({Mode.INFERENCE, Mode.TRAINING})
    compiles = False

    def probe(self, device: DeviceSpec) -> Skip | None:  # noqa: ARG002
        """bfloat16 runs everywhere, if slowly without hardware for it."""
        return None

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """Cast before autocast; formats with hardware first; training only by autocast."""
        floats = [d for d in workload.dtypes if d.startswith("float")]
        inputs = [s.dtype for case in workload.signatures.values() for s in case if s.dtype.startswith("float")]
        source = next(iter(workload.dtypes or inputs), "")
        if not floats and "float32" not in inputs:
            if source == "bfloat16":
                return Skip("the model is bfloat16 already")
            return Skip("the model has no floating-point parameters or inputs to cast")
        if source == "float16":
            return Skip("the model is float16 already")
        training = workload.mode is Mode.TRAINING
        # float16 training needs a loss scaler in the user's loop, which a plan must not ask for.
        formats = [f for f in ("bfloat16", "float16") if _native(f, device) and not (training and f == "float16")]
        if "bfloat16" not in formats:
            formats.append("bfloat16")
        steps = []
        for how in ("autocast",) if training else ("cast", "autocast"):
            steps += [Step(self.name, {"to": f, "how": how}) for f in formats]
        if "tf32" in device.features and source == "float32":
            steps.append(Step(self.name, {"to": "tf32"}))
        return steps

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """Compute classes gain the ratio of peak rates or reach the new peak; the rest gains half its bytes."""
        to = str(step.params["to"])
        old, new = rate(device, "float32"), rate(device, to)
        ratio = new / old if old and new else 2.0
        if device.vendor == "cpu" and to != "tf32" and not _native(to, device):
            ratio = min(ratio, 1.0)
        remaining = {}
        for share in prediction.shares:
            if share.kind in COMPUTE:
                remaining[share.kind] = min(1 / ratio, roofline(share, prediction, device, to))
            elif share.kind not in ("overhead", "optimizer") and to != "tf32":
                remaining[share.kind] = 0.5
        return bounded(prediction, remaining)

    def apply(self, program: Program, step: Step) -> Program:
        """Convert the parameters and wrap the call."""
        to, how = str(step.params["to"]), str(step.params.get("how", ""))
        if to == "tf32":
            program.call = Scoped(program.call, _tf32)
            return program
        if to not in _FAST_ON_CPU or how not in ("cast", "autocast"):
            raise CandidateError(f"unknown step {step}; expected to=bfloat16|float16 and how=cast|autocast")
        if how == "cast" and program.mode is Mode.TRAINING:
            raise CandidateError(f"{step} would replace the parameters that the optimizer holds; use how=autocast")
        target, source = getattr(torch, to), main_dtype(program.model)
        if target is source:
            raise CandidateError(f"the model is {to} already")
        if how == "autocast":
            program.call = autocast(program.call, _device_type(program.model), target, source)
            return program
        changed = cast_parameters(program.model, target, source)

        def undo() -> None:
            for tensor, held, version in changed:
                # Values loaded since then are kept, at the precision they now have.
                tensor.data = held if tensor._version == version else tensor.data.to(source)  # noqa: SLF001

        program.undo.append(undo)
        program.call = cast(program.call, target, source)
        return program

    def source(self, step: Step) -> str:
        """The same functions, and a call of them."""
        to, how = step.params["to"], step.params.get("how")
        if to == "tf32":
            return plain_source(_tf32, scoped, then="call = scoped(call, _tf32)")
        if how == "autocast":
            return plain_source(
                map_tensors, main_dtype, _device_type, autocast,
                then=f"call = autocast(call, _device_type(model), torch.{to}, main_dtype(model))",
            )  # fmt: skip
        then = f"_held = main_dtype(model)\ncast_parameters(model, torch.{to}, _held)\n"
        then += f"call = cast(call, torch.{to}, _held)"
        return plain_source(map_tensors, main_dtype, cast_parameters, cast, then=then)


def _native(to: str, device: DeviceSpec) -> bool:
    if device.vendor == "cpu":
        return any(f in device.features for f in _FAST_ON_CPU[to])
    return rate(device, to) > 0 or to in device.features or not device.peak_flops


def _device_type(model: nn.Module) -> str:
    return next((p.device.type for p in model.parameters()), "cpu")
