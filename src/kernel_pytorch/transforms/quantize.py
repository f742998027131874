"""Quantise linear layers through torchao: int8, int4 and float8, weights alone or activations too."""

from __future__ import annotations

import functools
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.ceilings import bounded, rate, roofline
from kernel_pytorch.transforms.plain_source import plain_source

__all__ = ["Quantize", "configuration", "quantizable_linears", "quantize_linears"]

_INSTALL = "pip install torchao"
_PEAK = {"int8_dynamic": "int8", "float8_dynamic": "float8"}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torchao's import, which warns of extensions for other machines, off the log."""
    names = ("torchao", "torch.utils._pytree")
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def configuration(scheme: str, device: str) -> Any:
    """Return torchao's configuration of a scheme; `set_inductor_config` off, as that is process-wide."""
    import torchao.quantization as q

    if scheme == "int8_dynamic":
        return q.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    if scheme == "int8_weight_only":
        return q.Int8WeightOnlyConfig(set_inductor_config=False)
    if scheme == "float8_dynamic":
        return q.Float8DynamicActivationFloat8WeightConfig(granularity=q.PerRow(), set_inductor_config=False)
    if device != "cpu":
        return q.Int4WeightOnlyConfig(group_size=128, set_inductor_config=False)
    # The layout for CPUs is in torchao's prototypes.
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=128)


def quantizable_linears(model: nn.Module, multiple: int) -> list[nn.Linear]:
    """Return plain linear layers with untied weights whose inputs are a multiple of `multiple`.

    A weight shared with another module (an embedding) is left alone: quantising it would untie the two.
    """
    shared: dict[int, int] = {}
    for module in model.modules():
        for tensor in module._parameters.values():  # noqa: SLF001
            shared[id(tensor)] = shared.get(id(tensor), 0) + 1
    return [
        m
        for m in model.modules()
        if type(m) is nn.Linear
        and type(m._parameters.get("weight")) is nn.Parameter  # noqa: SLF001
        and shared[id(m.weight)] == 1
        and m.in_features % multiple == 0
        and m.out_features % min(multiple, 16) == 0
    ]


def quantize_linears(linears: list[nn.Linear], config: Any) -> list[Any]:
    """Quantise the weights in place and return what removes the hooks.

    A checkpoint of the original model still loads: a float weight is quantised on its way in.
    """
    from torchao.quantization import quantize_

    def on_load(module: Any, state_dict: Any, prefix: Any, *_: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if type(weight) in (torch.Tensor, nn.Parameter):
            fresh = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            fresh.weight = nn.Parameter(
                weight.detach().to(module.weight.device, module.weight.dtype), requires_grad=False
            )
            quantize_(fresh, config)
            state_dict[prefix + "weight"] = fresh.weight.detach()

    removals = []
    for linear in linears:
        quantize_(linear, config)
        removals.append(linear.register_load_state_dict_pre_hook(on_load))  # type: ignore[no-untyped-call]
    return removals


@functools.cache
def _failure(scheme: str, device: str) -> str:
    """Return why a scheme does not run here, found by running it once; empty where it does."""
    try:
        with _quiet(), torch.no_grad():
            linear = nn.Linear(256, 128, device=device, dtype=torch.bfloat16)
            quantize_linears([linear], configuration(scheme, device))
            linear(torch.zeros(16, 256, device=device, dtype=torch.bfloat16))
    except Exception as error:  # noqa: BLE001 - torchao asserts, imports and raises what it likes
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    return ""


class Quantize:
    """One scheme of torchao: `int8_dynamic`, `int8_weight_only`, `int4_weight_only` or `float8_dynamic`."""

    group = "weights"
    numerics = Numerics.LOWER_PRECISION
    modes = frozenset({Mode.INFERENCE})
    compiles = False
    tries_late = True
    """Of twenty such trials in this project's own results, twenty were beyond the accuracy budget or failed."""

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme
        self.name = f"quantize_{scheme}"
        self.summary = f"{scheme.replace('_', ' ')} linear layers by torchao"

    def probe(self, device: DeviceSpec) -> Skip | None:
        """Torchao is needed, and a machine on which one small layer runs."""
        if device.vendor == "tpu":
            return Skip("torchao's kernels are for CPUs and GPUs")
        if importlib.util.find_spec("torchao") is None:
            return Skip("torchao is not installed", fix=_INSTALL)
        if self.scheme == "float8_dynamic" and "fp8" not in device.features:
            return Skip("the device has no float8 matrix units (needs Ada, Hopper or newer, MI300, or XPU)")
        kind = {"nvidia": "cuda", "amd": "cuda", "intel": "xpu"}.get(device.vendor, "cpu")
        failure = _failure(self.scheme, kind)
        return Skip(f"torchao cannot run {self.scheme} on this machine: {failure}") if failure else None

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """For models with linear layers."""
        if workload.mode is Mode.TRAINING:
            return Skip("quantised weights are for inference")
        if "Linear" not in workload.modules:
            return Skip("the model has no nn.Linear")
        return self.probe(device) or [Step(self.name)]

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """Matrix products gain the ratio of peak rates, or the bytes their weights shrink by; the rest stays."""
        del step
        shrink = 8.0 if self.scheme.startswith("int4") else 4.0
        old, new = rate(device, "float32"), rate(device, _PEAK.get(self.scheme, "bfloat16"))
        ratio = max(shrink, new / old if old else 0.0)
        remaining = {}
        for share in prediction.shares:
            if share.kind == "matmul":
                remaining[share.kind] = min(
                    1 / ratio, roofline(share, prediction, device, _PEAK.get(self.scheme, "bfloat16"))
                )
        return bounded(prediction, remaining)

    def apply(self, program: Program, step: Step) -> Program:
        """Quantise the weights in place; `undo` puts the old ones back."""
        linears = quantizable_linears(program.model, _multiple(self.scheme))
        if not linears:
            raise CandidateError(f"{step}: no plain, untied nn.Linear whose sizes suit it")
        before = [(linear, dict(vars(linear)), linear.weight) for linear in linears]
        removals: list[Any] = []

        def undo() -> None:
            for handle in removals:
                handle.remove()
            for linear, attributes, weight in before:
                for extra in set(vars(linear)) - set(attributes):
                    delattr(linear, extra)
                linear.weight = weight

        try:
            with _quiet():
                config = configuration(self.scheme, linears[0].weight.device.type)
                removals += quantize_linears(linears, config)
        except Exception as error:
            undo()
            raise CandidateError(f"torchao cannot apply {step}: {type(error).__name__}: {error}") from error
        program.undo.append(undo)
        total = sum(type(m) is nn.Linear for m in program.model.modules())
        if len(linears) < total:
            program.notes.append(f"{len(linears)} of {total} linear layers are quantised: the others are tied or odd")
        return program

    def source(self, step: Step) -> str:
        """The same functions over the linear layers."""
        del step
        then = f"_linears = quantizable_linears(model, {_multiple(self.scheme)})\n"
        then += f"quantize_linears(_linears, configuration({self.scheme!r}, _linears[0].weight.device.type))"
        functions: tuple[Callable[..., Any], ...] = (configuration, quantizable_linears, quantize_linears)
        return plain_source(*functions, then=then)


def _multiple(scheme: str) -> int:
    return {"int4_weight_only": 128, "float8_dynamic": 16}.get(scheme, 1)
