"""`kpt history`: what the guard has found over time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_pytorch.cli.output import emit
from kernel_pytorch.cli.verdict import show as show_comparisons
from kernel_pytorch.errors import KptError, OutputDirectoryError
from kernel_pytorch.guard.history import History, changes, open_history
from kernel_pytorch.plan.store import write_text

if TYPE_CHECKING:
    from kernel_pytorch.guard.types import Comparison

__all__ = ["export", "list_runs", "plot", "prune", "send", "show"]

_SHORT_ID = 10


def _opened(url: str | None) -> History:
    history = open_history(url)
    if history is None:
        raise KptError("no history is kept: it is switched off", fix="--history URL, or unset KPT_HISTORY")
    return history


def list_runs(*, history: str | None, name: str | None, since: str | None, limit: int, form: str) -> int:
    """Print runs, the newest last, and where their level changed."""
    store = _opened(history)
    runs = store.runs(name, since, limit)
    points, why = _changes(runs)

    def data() -> dict[str, Any]:
        from kernel_pytorch.plan.schema import plain

        return {
            "history": store.address.shown,
            "waiting": len(store.waiting()),
            "runs": [_row(run) for run in runs],
            "changes": plain(points),
        }

    def text(console: Any) -> None:
        _table(runs, console)
        for point in points:
            old, new = f"{point.before:.4g}", f"{point.after:.4g}"
            moved = f"{old} -> {new} ({100.0 * (point.change - 1.0):+.1f} %)"
            what = f"{point.name}: {point.metric} {moved} from {point.created} on"
            because = f": {', '.join(point.differences)}" if point.differences else ""
            console.print(f"change point  {what}{because}", markup=False, soft_wrap=True)
        if why:
            console.print(f"no change points: {why}", markup=False, soft_wrap=True)
        if (waiting := len(store.waiting())) > 0:
            console.print(f"{waiting} more wait on this machine: kpt history send", markup=False, soft_wrap=True)
        console.print(f"{len(runs)} runs of {store.address.shown}", markup=False, soft_wrap=True)

    emit(form, data, text)
    return 0


def _changes(runs: Sequence[Comparison]) -> tuple[Sequence[Any], str]:
    """Return the change points, or why there are none to be had."""
    try:
        return changes(runs), ""
    except KptError as error:
        return (), f"{error}; fix: {error.fix}" if error.fix else str(error)


def _row(run: Comparison) -> dict[str, Any]:
    from kernel_pytorch.report.compared import median_ms

    change = run.change
    bounds = {name: getattr(change, name) if change else None for name in ("value", "low", "high")}
    return {
        "id": run.id,
        "created": run.created,
        "kind": run.kind,
        "name": run.name,
        "verdict": str(run.verdict),
        "reason": run.reason,
        "change": bounds["value"],
        "change_low": bounds["low"],
        "change_high": bounds["high"] if bounds["high"] != float("inf") else None,
        "base_ms": median_ms(run.base_samples_ms),
        "head_ms": median_ms(run.head_samples_ms),
        "revision": run.head.revision,
    }


def _table(runs: Sequence[Comparison], console: Any) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from kernel_pytorch.report import figures
    from kernel_pytorch.report.compared import change, median_ms, one_line

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for column in ("Run", "When", "Verdict", "What", "Change of the time", "Head"):
        table.add_column(column, overflow="fold")
    for run in runs:
        head = median_ms(run.head_samples_ms)
        cells = (
            run.id[:_SHORT_ID],
            run.created[:16].replace("T", " "),
            str(run.verdict),
            one_line(run.name, 60),
            change(run.change),
            "-" if head is None else figures.milliseconds(head),
        )
        table.add_row(*map(Text, cells))
    if runs:
        console.print(table)


def plot(*, history: str | None, name: str | None, since: str | None, output: str) -> int:
    """Write the page of trends and print where it is."""
    store = _opened(history)
    path = Path(output).expanduser().absolute()
    if not path.parent.is_dir():
        raise OutputDirectoryError(f"cannot write {output}: there is no such directory", fix="create it first")
    runs = store.runs(name, since)
    points, why = _changes(runs)
    from kernel_pytorch.report.trends import write_trends

    try:
        write_trends(runs, points, path, source=store.address.shown, notes=[f"no change points: {why}"] if why else [])
    except OSError as error:
        raise OutputDirectoryError(f"cannot write {output}: {error.strerror or error}") from error
    sys.stdout.write(f"{output}\n")
    return 0


def show(*, history: str | None, run_id: str, form: str, output: str | None) -> int:
    """Print one run as the command that made it did."""
    show_comparisons([_opened(history).run(run_id)], form=form, output=output)
    return 0


def export(*, history: str | None, name: str | None, since: str | None, form: str, output: str | None) -> int:
    """Print all runs for other programs."""
    text = _opened(history).export("csv" if form == "csv" else "json", name=name, since=since)
    if output is None:
        sys.stdout.write(text)
    else:
        write_text(Path(output).expanduser().absolute(), text)
    return 0


def prune(*, history: str | None, keep_days: float | None, keep_runs: int | None, form: str) -> int:
    """Delete old runs."""
    store = _opened(history)
    deleted = store.prune(keep_days=keep_days, keep_runs=keep_runs)
    emit(
        form,
        lambda: {"deleted": deleted},
        lambda console: console.print(f"deleted {deleted} runs of {store.address.shown}", markup=False, soft_wrap=True),
    )
    return 0


def send(*, history: str | None, form: str) -> int:
    """Send the runs that wait on the local disk; return 1 where some still do."""
    store = _opened(history)
    receipt = store.flush()

    def data() -> dict[str, Any]:
        return {"sent": receipt.sent, "waiting": receipt.waiting, "message": receipt.message, "fix": receipt.fix}

    def text(console: Any) -> None:
        told = f"sent {receipt.sent} runs to {store.address.shown}, {receipt.waiting} wait"
        if receipt.message:
            told += f": {receipt.message}" + (f"; fix: {receipt.fix}" if receipt.fix else "")
        console.print(told, markup=False, soft_wrap=True)

    emit(form, data, text)
    return 1 if receipt.waiting else 0
