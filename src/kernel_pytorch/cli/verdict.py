"""What is done with comparisons: keep them, print them, turn their verdicts into an exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kernel_pytorch.core.types import Verdict

if TYPE_CHECKING:
    from kernel_pytorch.guard.types import Comparison

__all__ = ["check_places", "conclude", "keep", "keep_interrupted", "show"]


def check_places(history: str | None, output: str | None) -> None:
    """Refuse at once what would be refused after minutes: a history that names no place, a file in no directory.

    Raises:
        KptError: One of them.
    """
    from kernel_pytorch.errors import OutputDirectoryError
    from kernel_pytorch.guard.history import open_history

    open_history(history)
    if output is not None and not Path(output).expanduser().absolute().parent.is_dir():
        raise OutputDirectoryError(f"cannot write {output}: there is no such directory", fix="create it first")


def conclude(comparisons: Sequence[Comparison], *, form: str, output: str | None, inconclusive: str) -> int:
    """Print comparisons and return the exit code of the worst.

    Args:
        comparisons: What to print.
        form: `text`, `json`, `markdown`, `junit` or `prometheus`.
        output: File that gets this form, beside text on stdout; `None` prints it on stdout.
        inconclusive: `pass` or `fail`: what an undecided comparison exits as.
    """
    from kernel_pytorch.report.compared import fails

    show(comparisons, form=form, output=output, inconclusive=inconclusive)
    for one in comparisons:
        if one.verdict is Verdict.INCONCLUSIVE:
            told = " ".join(f"{one.name}: {one.reason}".split())
            sys.stderr.write(f"kpt: not decided (--inconclusive {inconclusive}): {told}\n")
    return 1 if any(fails(one.verdict, inconclusive=inconclusive) for one in comparisons) else 0


def show(comparisons: Sequence[Comparison], *, form: str, output: str | None, inconclusive: str = "pass") -> None:
    """Print comparisons, or write them to a file and print text."""
    if output is not None:
        from kernel_pytorch.plan.store import write_text

        write_text(Path(output).expanduser().absolute(), _written(comparisons, form, inconclusive))
    if output is None and form != "text":
        sys.stdout.write(_written(comparisons, form, inconclusive))
        return
    from rich.console import Console

    from kernel_pytorch.report.comparison import render_comparison

    console = Console(file=sys.stdout, highlight=False)
    for i, one in enumerate(comparisons):
        if i:
            console.print()
        render_comparison(one, console)


def _written(comparisons: Sequence[Comparison], form: str, inconclusive: str) -> str:
    """Return comparisons in a form; as JSON, one is an object and several are an array."""
    from kernel_pytorch.report import comparison as report

    if form == "json":
        plain = [report.as_json(one) for one in comparisons]
        return json.dumps(plain[0] if len(plain) == 1 else plain, indent=2, allow_nan=False) + "\n"
    if form == "markdown":
        return report.as_markdown(comparisons)
    if form == "junit":
        return report.as_junit(comparisons, inconclusive=inconclusive)
    if form == "prometheus":
        return report.as_prometheus(comparisons)
    return "\n".join(map(report.as_text, comparisons))


def keep_interrupted(comparison: Comparison, history: str | None) -> None:
    """Record what was sampled before Ctrl-C, and say where it is."""
    from kernel_pytorch.guard.history import open_history

    keep([comparison], history)
    pairs = len(comparison.head_samples_ms)
    if pairs and open_history(history) is not None:
        sys.stderr.write(f"kpt: the {pairs} pairs sampled until then are kept: kpt history show {comparison.id[:10]}\n")


def keep(comparisons: Sequence[Comparison], history: str | None) -> None:
    """Record comparisons and say on stderr what could not be.

    Args:
        comparisons: What to record.
        history: Where; `none` records nothing, `None` is the default history.

    Raises:
        HistoryError: It names no place.
    """
    from kernel_pytorch.guard.history import open_history

    store = open_history(history)
    for one in comparisons if store is not None else ():
        receipt = store.record(one)  # type: ignore[union-attr]  # there is one where the loop runs
        if receipt.message:
            fix = f"; fix: {receipt.fix}" if receipt.fix else ""
            sys.stderr.write(f"kpt: history: {' '.join(receipt.message.split())}{fix}\n")
