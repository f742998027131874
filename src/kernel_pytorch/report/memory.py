"""What a plan knows of memory, beside what the device has: by the device's own compiler, and as it was measured."""

from __future__ import annotations

from typing import Any

from kernel_pytorch.core.step_memory import StepMemory, Whose
from kernel_pytorch.core.types import Plan
from kernel_pytorch.report import figures, reading
from kernel_pytorch.report.fit_page import memory_bar

__all__ = ["memory_groups", "memory_verdict"]


def memory_groups(plan: Plan) -> list[dict[str, Any]]:
    """Return what the page's section on memory shows: one group for each way in which a plan knows its memory."""
    return [group for group in (_compiled(plan), _measured(plan)) if group]


def memory_verdict(memory: StepMemory) -> str:
    """Return in a line whether a step fits, and what it takes of what there is."""
    capacity = figures.size(memory.capacity_bytes)
    if memory.fits:
        share = figures.percent(memory.peak_bytes / memory.capacity_bytes)
        return f"fits: {figures.size(memory.peak_bytes)} of {capacity} ({share})"
    if memory.fits is None:
        return f"not known: {memory.reason}"
    needs = f"needs {figures.size(memory.needed_bytes)}" if memory.needed_bytes else "needs more than"
    return f"does not fit: {needs} of {capacity}: {memory.reason}"


def _compiled(plan: Plan) -> dict[str, Any]:
    if not plan.memory:
        return {}
    whole = max(max(m.capacity_bytes, m.peak_bytes, m.needed_bytes) for m in plan.memory)
    changed = any(m.whose is Whose.CHOSEN for m in plan.memory)
    largest = next((m for m in reversed(plan.memory) if m.modules), None)
    return {
        "title": f"By the compiler, for {plan.memory[0].place}",
        "caption": (
            "What the TPU's own compiler assigns on one device when the whole step is one program. Compiled without "
            "the device: unverified on hardware."
        ),
        "rows": [_row(plan, m, whole) for m in plan.memory],
        "note": (
            "The plan changes how the step is compiled, not what it computes: here it is the unmodified program."
            if plan.candidate.steps and not changed
            else ""
        ),
        "whose": "" if largest is None else str(largest.whose),
        "modules": [] if largest is None else [(m.module, figures.size(m.bytes)) for m in largest.modules],
    }


def _row(plan: Plan, memory: StepMemory, whole: int) -> dict[str, Any]:
    parts = dict(memory.parts) if memory.fits else {"needed": memory.needed_bytes} if memory.needed_bytes else {}
    return {
        "label": _label(plan, chosen=memory.whose is Whose.CHOSEN),
        "verdict": memory_verdict(memory),
        "good": memory.fits,
        "bar": memory_bar(parts, capacity_bytes=memory.capacity_bytes, whole_bytes=whole, hue="wrong"),
    }


def _measured(plan: Plan) -> dict[str, Any]:
    measurement, device = plan.chosen.measurement, plan.device
    if measurement is None or measurement.baseline_peak_bytes is None or not device.memory_bytes:
        return {}
    held = {False: measurement.baseline_peak_bytes}
    if plan.candidate.steps and measurement.peak_bytes is not None:
        held[True] = measurement.peak_bytes
    caption = "The most memory that was held at any moment while it ran, parameters included."
    if device.vendor == "cpu" or device.arch == "emulated":
        caption += " It is memory of the process, beside all that this machine has."
    if device.arch == "emulated":
        caption += " Under emulation it says nothing about a chip."
    elif not device.verified:
        caption += " Unverified: the contract suite has not run on this kind of hardware."
    whole = max(device.memory_bytes, *held.values())
    rows = [
        {
            "label": _label(plan, chosen=chosen),
            "verdict": f"{figures.size(peak)} of {figures.size(device.memory_bytes)} "
            f"({figures.percent(peak / device.memory_bytes)})",
            "good": peak <= device.memory_bytes,
            "bar": memory_bar(
                {"peak": peak},
                capacity_bytes=device.memory_bytes,
                whole_bytes=whole,
                hue="chosen" if chosen else "base",
            ),
        }
        for chosen, peak in held.items()
    ]
    title = f"Measured on {device.name}"
    return {"title": title, "caption": caption, "rows": rows, "note": "", "whose": "", "modules": []}


def _label(plan: Plan, *, chosen: bool) -> str:
    return f"chosen: {reading.short(plan.candidate)}" if chosen else "unmodified"
