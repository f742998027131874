"""What a search over memory patterns found, for the terminal and as JSON values."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kernel_pytorch.fit.patterns import Searched, Tried
from kernel_pytorch.report import figures
from kernel_pytorch.report.fit import fit_data, headline, render_fit

__all__ = ["render_search", "search_data"]


def search_data(searched: Searched) -> dict[str, Any]:
    """Return what was tried and chosen as JSON values."""
    return {
        "goal": searched.goal,
        "flops": searched.survey.flops,
        "chosen": None if searched.chosen is None else _tried_data(searched.chosen),
        "tried": [_tried_data(tried) for tried in searched.tried],
        "left_out": [{"pattern": s.transform, "reason": s.reason} for s in searched.survey.left_out],
    }


def _tried_data(tried: Tried) -> dict[str, Any]:
    return {
        "patterns": [{"transform": s.transform, "params": dict(s.params)} for s in tried.candidate.steps],
        "label": tried.candidate.label,
        "extra_flops": tried.extra_flops,
        "reason": tried.reason,
        "fit": None if tried.fit is None else fit_data(tried.fit),
    }


def render_search(searched: Searched, console: Console) -> None:
    """Print what was tried, then the answer for what was chosen."""
    console.print(Text(f"searched for {searched.goal}", style="bold"))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("peak", "operations", "fits", "patterns"):
        table.add_column(column, justify="left" if column == "patterns" else "right", no_wrap=column != "patterns")
    for tried in searched.tried:
        chosen = "  <- chosen" if tried is searched.chosen else ""
        table.add_row(*_row(tried), f"{tried.candidate.label}{chosen}")
    console.print(table)
    for tried in searched.tried:
        if tried.fit is None:
            console.print(Text(f"not compiled: {tried.candidate.label}: {tried.reason}"), soft_wrap=True)
    for skipped in searched.survey.left_out:
        console.print(Text(f"left out: {skipped.transform}: {skipped.reason}"), soft_wrap=True)
    if searched.chosen is None or searched.chosen.fit is None:
        console.print(Text("no set of patterns reaches it", style="bold red"))
        return
    console.print()
    render_fit(searched.chosen.fit, console)


def _row(tried: Tried) -> tuple[str, str, str]:
    fit = tried.fit
    if fit is None:
        return "-", f"{tried.extra_flops:+.1%}", "-"
    size = figures.size(fit.peak_bytes or fit.needed_bytes)
    return size, f"{tried.extra_flops:+.1%}", "yes" if fit.fits else headline(fit).split(":")[0]
