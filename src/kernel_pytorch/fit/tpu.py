"""Fit on a TPU slice that is not there: traced, lowered, and compiled by the real compiler."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import replace

from kernel_pytorch.backends.tpu.ahead import COMPILE_LIMIT_S, Lowered, compile_lowered, lower_program
from kernel_pytorch.backends.tpu.compiler import Compiled
from kernel_pytorch.backends.tpu.sharding import argument_shardings, spread_marks
from kernel_pytorch.backends.tpu.topology import Topology
from kernel_pytorch.core.types import Mode
from kernel_pytorch.fit.build import Build
from kernel_pytorch.fit.outcome import Fit, How, by_module, parts_of
from kernel_pytorch.fit.roofline import predict_step
from kernel_pytorch.hardware.tpu.specs import CHIPS

__all__ = ["fit_tpu", "outcome"]

_NOTE = "the TPU compiler's own figures for one device; nothing ran, and none of it is verified on hardware"


def fit_tpu(
    build: Build, topology: Topology, *, name: str = "", dump: bool = True, timeout_s: float = COMPILE_LIMIT_S
) -> Fit:
    """Return memory and cost of a program's step on one device of a slice.

    Args:
        build: The program.
        topology: The slice; every device of it runs the same step on a batch of its own, unless a `shard` step spreads
            one batch and the state over them.
        name: Of the target, for people.
        dump: Also read which buffers there are.
        timeout_s: Limit of the compilation.

    Raises:
        KptError: The program cannot be traced or lowered, or the compiler is missing or refuses it.
    """
    began = time.perf_counter()
    lowered = lower_program(build)
    sharding = next((s.params for s in build.candidate.steps if s.transform == "shard"), None)
    if sharding is None:
        compiled = compile_lowered(lowered, topology, dump=dump, timeout_s=timeout_s)
    else:
        lowered = replace(lowered, stablehlo=spread_marks(lowered.stablehlo, topology.devices))
        compiled = compile_lowered(
            lowered,
            topology,
            partitions=topology.devices,
            argument_shardings=argument_shardings(lowered.arguments, topology.devices, str(sharding["parameters"])),
            windows=bool(sharding.get("windows", True)),
            dump=dump,
            timeout_s=timeout_s,
        )
    total = time.perf_counter() - began
    split = 1 if sharding is None else topology.devices
    fit = outcome(lowered, compiled, topology, mode=build.mode, name=name, split=split)
    return replace(fit, seconds={**fit.seconds, "total": total})


def outcome(
    lowered: Lowered, compiled: Compiled, topology: Topology, *, mode: Mode, name: str = "", split: int = 1
) -> Fit:
    """Return what a lowered and compiled program says of itself; `split` devices share its operations."""
    chip = CHIPS[topology.generation]
    capacity = _capacity(compiled) or chip.hbm_bytes // topology.devices_per_chip
    prediction = None
    if compiled.fits:
        prediction = predict_step(
            flops=lowered.flops // split,
            bytes_accessed=compiled.bytes_accessed,
            peak_flops=chip.bf16_flops / topology.devices_per_chip,
            bandwidth_bytes_per_s=chip.bandwidth_bytes_per_s / topology.devices_per_chip,
            collectives=compiled.collectives,
            network_bytes_per_s=chip.ici_bytes_per_s,
        )
    return Fit(
        name=name,
        device="tpu",
        place=topology.name,
        how=How.COMPILED,
        mode=mode,
        batch=lowered.batch,
        chips=topology.chips,
        fits=compiled.fits,
        message=compiled.message,
        peak_bytes=compiled.peak_bytes,
        assigned_bytes=compiled.assigned_bytes,
        needed_bytes=_needed(compiled.message),
        capacity_bytes=capacity,
        parts=_parts(lowered, compiled),
        buffers=compiled.buffers,
        modules=by_module(compiled.buffers),
        flops=lowered.flops,
        flops_by_operator=lowered.flops_by_operator,
        bytes_accessed=compiled.bytes_accessed,
        collectives=compiled.collectives,
        prediction=prediction,
        seconds={"trace and lower": lowered.seconds, "compile": compiled.seconds},
        software=compiled.software,
        notes=(_NOTE,),
    )


def _parts(lowered: Lowered, compiled: Compiled) -> Mapping[str, int]:
    parts = parts_of(lowered.arguments, {b.name: b.bytes for b in compiled.buffers if b.kind == "argument"})
    if compiled.fits:
        parts["temporaries"] = max(compiled.peak_bytes - sum(parts.values()), 0)
    return parts


_MEMORY = re.compile(r"\(?([\d.]+)([KMG])\)?\s*(?:exceeds available HBM \(|of )([\d.]+)([KMG])")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _needed(message: str) -> int:
    match = _MEMORY.search(message)
    return int(float(match[1]) * _UNITS[match[2]]) if match else 0


def _capacity(compiled: Compiled) -> int:
    match = _MEMORY.search(compiled.message)
    return int(float(match[3]) * _UNITS[match[4]]) if match else 0
