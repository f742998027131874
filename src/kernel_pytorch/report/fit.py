"""An answer of `kpt fit` for the terminal and as JSON values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kernel_pytorch.fit.outcome import Fit, How
from kernel_pytorch.plan.schema import plain
from kernel_pytorch.report import figures

__all__ = ["fit_data", "headline", "largest_buffers", "render_fit"]

_SHOWN = 12
_BAR = 50


def headline(fit: Fit) -> str:
    """Return the verdict in one line."""
    where = fit.place if fit.chips == 1 else f"one of {fit.chips} chips of {fit.place}"
    if fit.fits is None:
        return f"needs {figures.size(fit.peak_bytes)} on {where}"
    if not fit.fits:
        needs = f"needs {figures.size(fit.needed_bytes)}" if fit.needed_bytes else "needs more"
        return f"does not fit {where}: {needs} of {figures.size(fit.capacity_bytes)}"
    share = fit.peak_bytes / fit.capacity_bytes if fit.capacity_bytes else 0.0
    return (
        f"fits {where}: {figures.size(fit.peak_bytes)} of {figures.size(fit.capacity_bytes)} ({figures.percent(share)})"
    )


def fit_data(fit: Fit) -> dict[str, Any]:
    """Return the answer as JSON values; buffers below the largest are summed by module."""
    data: dict[str, Any] = plain(replace(fit, buffers=largest_buffers(fit)))
    if fit.prediction is not None:
        prediction = fit.prediction
        data["prediction"] |= {"step_s": prediction.step_s, "serial_s": prediction.serial_s, "bound": prediction.bound}
    data["headline"] = headline(fit)
    return data


def largest_buffers(fit: Fit) -> tuple[Any, ...]:
    """Return the largest buffers, arguments and temporaries alike."""
    return tuple(sorted(fit.buffers, key=lambda b: b.bytes, reverse=True)[: 4 * _SHOWN])


def render_fit(fit: Fit, console: Console) -> None:
    """Print the verdict, where the memory goes, and what a step costs."""
    style = "bold red" if fit.fits is False else "bold green" if fit.fits else "bold"
    console.print(Text(headline(fit), style=style))
    if fit.message:
        console.print(Text(fit.message.splitlines()[0]), soft_wrap=True)
    console.print(_parts(fit))
    if fit.modules:
        console.print(Text("\nTemporaries at the peak, by the module that made them", style="bold"))
        console.print(_modules(fit))
    if fit.buffers:
        console.print(Text("\nLargest buffers", style="bold"))
        console.print(_buffers(fit))
    console.print(Text("\nCost of a step", style="bold"))
    console.print(_cost(fit))
    for note in fit.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        right = column in ("bytes", "buffers", "share")
        table.add_column(column, justify="right" if right else "left", no_wrap=right)
    return table


def _parts(fit: Fit) -> Table:
    whole = max(fit.capacity_bytes, sum(fit.parts.values()), 1)
    table = _table("what", "bytes", "share", "")
    for name, size in fit.parts.items():
        table.add_row(name, figures.size(size), figures.percent(size / whole), "#" * round(_BAR * size / whole))
    return table


def _modules(fit: Fit) -> Table:
    table = _table("module", "bytes", "buffers")
    for entry in fit.modules[:_SHOWN]:
        table.add_row(entry.module, figures.size(entry.bytes), str(entry.buffers))
    if rest := fit.modules[_SHOWN:]:
        size, count = sum(m.bytes for m in rest), sum(m.buffers for m in rest)
        table.add_row(f"{len(rest)} other modules", figures.size(size), str(count))
    return table


def _buffers(fit: Fit) -> Table:
    table = _table("bytes", "shape", "made by")
    for buffer in largest_buffers(fit)[:_SHOWN]:
        made = f"{buffer.name} (argument)" if buffer.kind == "argument" else buffer.source or buffer.name
        table.add_row(figures.size(buffer.bytes), buffer.shape, made)
    return table


def _cost(fit: Fit) -> Table:
    table = _table("what", "value")
    if fit.flops:
        table.add_row("floating-point operations", figures.count(fit.flops, "FLOP"))
    if fit.bytes_accessed:
        table.add_row("memory accessed", figures.size(fit.bytes_accessed))
    if fit.assigned_bytes:
        table.add_row("memory set aside, holes included", figures.size(fit.assigned_bytes))
    for kind, size in fit.collectives.items():
        table.add_row(kind, figures.size(size))
    if (prediction := fit.prediction) is not None:
        table.add_row(
            f"step time ({prediction.label})",
            f"{figures.seconds(prediction.step_s)} to {figures.seconds(prediction.serial_s)}, "
            f"bound by {prediction.bound}",
        )
        table.add_row(f"MFU ({prediction.label})", f"at most {figures.percent(prediction.mfu)}")
    for name, seconds in fit.seconds.items():
        table.add_row(f"time to {name}" if name != "total" else "time in all", f"{seconds:.1f} s")
    if fit.how is How.COMPILED and fit.software:
        table.add_row("compiler", ", ".join(f"{name} {version}" for name, version in fit.software.items()))
    return table
