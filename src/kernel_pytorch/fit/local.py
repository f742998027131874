"""Fit on a CPU or a CUDA device: measured where the device is here and the step is expected to fit, else estimated."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import torch

from kernel_pytorch.backends import manager_for
from kernel_pytorch.backends.tpu.steps import StepGraph, trace_step
from kernel_pytorch.core.program import model_loss
from kernel_pytorch.core.protocols import HardwareManager, Program
from kernel_pytorch.core.types import DeviceSpec, Mode
from kernel_pytorch.core.workload import as_call
from kernel_pytorch.fit.build import Build, batch_size
from kernel_pytorch.fit.estimate import Estimate, estimate_memory
from kernel_pytorch.fit.outcome import Fit, How, by_module, parts_of
from kernel_pytorch.fit.roofline import predict_step
from kernel_pytorch.hardware import detect

__all__ = ["fit_local"]

_ESTIMATED = "estimated from the traced graph, as eager PyTorch would hold it; nothing ran"
_MARGIN = 0.9
"""Share of the memory up to which an estimate lets a step be run."""


def fit_local(build: Build, device: str, *, measure: bool = True) -> Fit:
    """Return memory and cost of a step on this machine's device.

    Args:
        build: The program.
        device: `cpu`, or `cuda` (then only estimated where there is none).
        measure: Run a step where the device is here.

    Raises:
        KptError: The program is wrong, or cannot be traced.
    """
    began = time.perf_counter()
    program, batch = build()
    step = trace_step(program, batch, device="cpu")
    estimate = estimate_memory(step)
    traced = time.perf_counter() - began
    here = device == "cpu" or torch.cuda.is_available()
    spec = detect("cpu" if device == "cpu" else "cuda:0") if here else None
    capacity = spec.memory_bytes if spec is not None else 0
    fit = _estimated(build.mode, device, step, estimate, spec)
    fit = replace(fit, batch=batch_size(batch), seconds={"trace": traced})
    free = psutil.virtual_memory().available if device == "cpu" else capacity
    if not measure or spec is None or estimate.peak_bytes > _MARGIN * free:
        return fit
    return _measured(build, fit, manager_for("cpu" if device == "cpu" else "cuda:0"))


def _estimated(mode: Mode, device: str, step: StepGraph, estimate: Estimate, spec: DeviceSpec | None) -> Fit:
    capacity = spec.memory_bytes if spec is not None else 0
    parts = parts_of(step.arguments)
    parts["temporaries"] = estimate.peak_bytes - estimate.held_bytes
    rate = spec.peak_flops.get(_dtype(step)) if spec is not None else None
    prediction = None
    if spec is not None and rate and spec.bandwidth_bytes_per_s:
        prediction = predict_step(
            flops=step.flops,
            bytes_accessed=estimate.moved_bytes,
            peak_flops=rate,
            bandwidth_bytes_per_s=spec.bandwidth_bytes_per_s,
        )
    return Fit(
        name="",
        device=device,
        place=spec.name if spec is not None else device,
        how=How.ESTIMATED,
        mode=mode,
        batch=0,
        fits=estimate.peak_bytes <= capacity if capacity else None,
        peak_bytes=estimate.peak_bytes,
        capacity_bytes=capacity,
        parts=parts,
        buffers=estimate.buffers,
        modules=by_module(estimate.buffers),
        flops=step.flops,
        flops_by_operator=step.flops_by_operator,
        bytes_accessed=float(estimate.moved_bytes),
        prediction=prediction,
        software={"torch": torch.__version__},
        notes=(_ESTIMATED,),
    )


def _dtype(step: StepGraph) -> str:
    """Return the dtype that most matrix products are in, by name."""
    sizes: dict[str, int] = {}
    for node in step.graph.graph.nodes:
        if str(getattr(node.target, "overloadpacket", "")) in step.flops_by_operator:
            for read in node.all_input_nodes[:1]:
                name = str(read.meta["val"].dtype).removeprefix("torch.") if hasattr(read.meta["val"], "dtype") else ""
                sizes[name] = sizes.get(name, 0) + 1
    return max(sizes, key=lambda name: sizes[name], default="float32")


def _measured(build: Build, fit: Fit, manager: HardwareManager) -> Fit:
    began = time.perf_counter()
    program, batch = replace(build, real=True)()
    program.model = manager.place(program.model)
    batch = manager.place(batch)
    run = _step(replace(build, real=True), program, batch)
    run()  # the optimizer makes its state
    above = manager.peak_bytes(run)
    if above is None:
        return fit
    held = fit.peak_bytes - fit.parts.get("temporaries", 0)
    parts = {**fit.parts, "temporaries": above}
    return replace(
        fit,
        how=How.MEASURED,
        fits=True,
        peak_bytes=held + above,
        parts=parts,
        seconds={**fit.seconds, "measure": time.perf_counter() - began},
        notes=(f"measured on {fit.place}; the buffers are those of the estimate",),
        verified=True,
    )


def _step(build: Build, program: Program, batch: Any) -> Callable[[], Any]:
    if build.mode is not Mode.TRAINING:
        call = as_call(batch)

        def infer() -> Any:
            with torch.no_grad():
                return program.model(*call.args, **call.kwargs)

        return infer
    loss, optimizer = program.step_loss(model_loss), program.optimizer
    assert optimizer is not None

    def train() -> Any:
        optimizer.zero_grad(set_to_none=True)
        value = loss(program.model, batch)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return None

    return train
