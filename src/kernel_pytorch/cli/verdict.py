"""What `kpt check` and `kpt compare` do with a comparison: keep it, print it, turn it into an exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kernel_pytorch.core.types import Verdict

if TYPE_CHECKING:
    from kernel_pytorch.guard.types import Comparison

__all__ = ["conclude", "keep"]


def conclude(comparison: Comparison, *, form: str, output: str | None, inconclusive: str) -> int:
    """Print a comparison and return the exit code of its verdict.

    Args:
        comparison: What to print.
        form: `text`, `json`, `markdown`, `junit` or `prometheus`.
        output: File that gets this form, beside text on stdout; `None` prints it on stdout.
        inconclusive: `pass` or `fail`: what an undecided comparison exits as.
    """
    from kernel_pytorch.report.compared import fails

    if output is None:
        _print(comparison, form, inconclusive)
    else:
        from kernel_pytorch.plan.store import write_text

        path = Path(output).expanduser().absolute()
        write_text(path, _written(comparison, form, inconclusive))
        _print(comparison, "text", inconclusive)
    if comparison.verdict is Verdict.INCONCLUSIVE:
        sys.stderr.write(f"kpt: not decided (--inconclusive {inconclusive}): {' '.join(comparison.reason.split())}\n")
    return 1 if fails(comparison.verdict, inconclusive=inconclusive) else 0


def _print(comparison: Comparison, form: str, inconclusive: str) -> None:
    if form != "text":
        sys.stdout.write(_written(comparison, form, inconclusive))
        return
    from rich.console import Console

    from kernel_pytorch.report.comparison import render_comparison

    render_comparison(comparison, Console(file=sys.stdout, highlight=False))


def _written(comparison: Comparison, form: str, inconclusive: str) -> str:
    from kernel_pytorch.report import comparison as report

    if form == "json":
        return json.dumps(report.as_json(comparison), indent=2, allow_nan=False) + "\n"
    if form == "markdown":
        return report.as_markdown([comparison])
    if form == "junit":
        return report.as_junit([comparison], inconclusive=inconclusive)
    if form == "prometheus":
        return report.as_prometheus([comparison])
    return report.as_text(comparison)


def keep(comparison: Comparison, history: str | None) -> None:
    """Record a comparison in the history; `none` records nothing, `None` is the default one."""
    if history == "none":
        return
    from kernel_pytorch.guard.history import History

    History(history).record(comparison)
