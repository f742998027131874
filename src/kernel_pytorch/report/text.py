"""The terminal's tables: plain rich renderables that stay readable at 80 columns, without colour and in a pipe."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kernel_pytorch.core.types import (
    DeviceSpec,
    NumericsReport,
    Plan,
    Prediction,
    Skip,
    Skipped,
    Status,
    Trial,
    WorkloadSpec,
)
from kernel_pytorch.report import figures, reading
from kernel_pytorch.report.memory import memory_verdict

__all__ = ["render_device", "render_packages", "render_numerics", "render_plan", "render_prediction", "styled_status"]

_STYLES = {
    Status.OK: "green",
    Status.WRONG: "red",
    Status.FAILED: "magenta",
    Status.TIMEOUT: "yellow",
    Status.OOM: "yellow",
}
_SHOWN_UNTRIED = 8
_SHOWN_CHECKS = 20
_WIDE = 96


def styled_status(status: Status) -> Text:
    """Return a status in its colour; the word carries the meaning alone where there is none."""
    return Text(str(status), style=_STYLES[status])


def render_plan(plan: Plan, console: Console) -> None:
    """Print the closing table of a search: what won and by how much, what lost and why, what was not tried."""
    won = bool(plan.candidate.steps)
    style = "bold green" if won else "bold"
    console.print(Text.assemble((reading.headline(plan), style), f": {reading.sentence(plan)}"))
    console.print(_key_facts(plan))
    _section(console, "What was tried (* is what the plan applies)")
    console.print(_trials(plan, wide=console.width >= _WIDE))
    losers = [t for t in reading.rank(plan) if t.candidate != plan.candidate and t.candidate.steps]
    if losers:
        _section(console, "Why the others lost")
        for trial in losers:
            name = Text(reading.short(trial.candidate), style="bold")
            _item(console, name, reading.why(plan, trial), status=trial.status)
    if plan.untried:
        _section(console, f"Not tried ({len(plan.untried)})")
        for reason, labels in reading.untried_by_reason(plan):
            _item(console, Text(_shortened(labels), style="bold"), reason)
    if plan.skipped:
        _section(console, "Skipped on this machine or model")
        for skipped in plan.skipped:
            _item(console, Text(skipped.transform, style="bold"), skipped.reason, fix=skipped.fix)


def render_device(spec: DeviceSpec, rows: Sequence[tuple[str, str, Skip | None]], console: Console) -> None:
    """Print the machine, and for every optimisation whether it can run here.

    Args:
        spec: The machine.
        rows: Transform name, what it does, and why it cannot run here (`None` where it can).
        console: Where to print.
    """
    console.print(Text.assemble((spec.name, "bold"), f"  ({spec.vendor}, {spec.arch})"))
    facts = _facts()
    memory = figures.size(spec.memory_bytes)
    _fill(facts, "memory", f"{memory}, {figures.rate(spec.bandwidth_bytes_per_s, 'B')}{_source(spec, 'bandwidth')}")
    _fill(facts, "devices", f"{spec.num_devices} {'physical cores' if spec.vendor == 'cpu' else 'devices'}")
    for dtype, peak in spec.peak_flops.items():
        _fill(facts, f"peak {dtype}", f"{figures.rate(peak, 'FLOP')}{_source(spec, dtype)}")
    _fill(facts, "features", ", ".join(spec.features) or "none beyond the base")
    _fill(facts, "software", ", ".join(f"{k} {v}" for k, v in spec.software.items()))
    _fill(
        facts,
        "verified",
        "yes: the contract suite has run on this kind of hardware"
        if spec.verified
        else "no: the contract suite has not been run on this kind of hardware",
    )
    console.print(facts)
    able = sum(skip is None for _, _, skip in rows)
    _section(console, f"Optimisations: {able} of {len(rows)} can run here")
    table = _table("", "Optimisation", "What it does, or why it cannot run here")
    for name, summary, skip in rows:
        body = Text(summary)
        if skip is not None:
            body.append(f"\n{skip.reason}", style="yellow")
            if skip.fix:
                body.append(f"\nfix: {skip.fix}", style="cyan")
        _fill(table, Text("yes", style="green") if skip is None else Text("no", style="yellow"), Text(name), body)
    console.print(table)


def render_packages(problems: Sequence[tuple[Skip, Sequence[str]]], console: Console) -> None:
    """Print what is wrong with the TPU packages that are installed, with its fix; nothing where nothing is.

    Args:
        problems: What is wrong, and what it stands in the way of.
        console: Where to print.
    """
    if not problems:
        return
    _section(console, "TPU packages")
    table = _table("Stands in the way of", "What is wrong")
    for skip, blocks in problems:
        body = Text.assemble((skip.reason, "yellow"), (f"\nfix: {skip.fix}", "cyan"))
        _fill(table, Text(", ".join(blocks) or "nothing"), body)
    console.print(table)


def render_prediction(spec: WorkloadSpec, prediction: Prediction, skipped: Sequence[Skipped], console: Console) -> None:
    """Print what can be said before anything is tried: where the time goes, the floor, and each upper bound."""
    best = max(prediction.ceilings.values(), default=1.0)
    answer = f"at most {figures.times(best)} from any single step" if prediction.ceilings else "no step applies here"
    console.print(Text.assemble("Will it help ", (spec.name or "this model", "bold"), "? ", (answer, "bold green")))
    facts = _facts()
    _fill(facts, "parameters", f"{figures.count(spec.parameters)}, {figures.size(spec.parameter_bytes)}")
    _fill(facts, "mode", str(spec.mode))
    _fill(
        facts,
        "work per call",
        f"{figures.count(prediction.flops, 'FLOP')}, at least {figures.size(prediction.bytes)} moved",
    )
    _fill(facts, "time now", figures.milliseconds(prediction.baseline_ms))
    _fill(
        facts,
        "floor",
        f"{figures.milliseconds(prediction.floor_ms)}: nothing at the model's own precision can be faster",
    )
    console.print(facts)
    _section(console, "Where the time goes")
    blocks = _can_encode(console, "█")
    table = _table("Operators", "Share", "", "Calls", right=(1, 3))
    for share in prediction.shares:
        bar = ("█" if blocks else "#") * max(1, round(share.time_share * 30))
        _fill(table, share.kind, figures.percent(share.time_share), Text(bar, style="blue"), f"{share.calls:,}")
    console.print(table)
    if prediction.ceilings:
        _section(console, "Upper bound of each step alone (Amdahl's law over the time it can touch)")
        table = _table("Step", "At most", right=(1,))
        for label, bound in reading.bounded(prediction):
            _fill(table, Text(reading.short_step(label)), figures.times(bound))
        console.print(table)
    for note in prediction.notes:
        console.print(_hanging(Text(f"- {note}"), "  "))
    if skipped:
        _section(console, "Skipped on this machine or model")
        for entry in skipped:
            _item(console, Text(entry.transform, style="bold"), entry.reason, fix=entry.fix)


def render_numerics(report: NumericsReport, console: Console) -> None:
    """Print what the validator compared, the worst first."""
    worst = report.worst
    if report.passed:
        verdict = Text.assemble(
            ("same function", "bold green"), f": all {len(report.checks)} checks are inside their budgets"
        )
    elif worst is None:
        verdict = Text.assemble(("undecided", "bold yellow"), ": nothing could be compared")
    else:
        failed = sum(not c.passed for c in report.checks)
        verdict = Text.assemble(
            ("not the same function", "bold red"),
            f": {failed} of {len(report.checks)} checks failed; {worst.detail or worst.name}",
        )
    console.print(verdict)
    facts = _facts()
    _fill(facts, "largest error", f"{figures.error(report.max_rel_error)} of {figures.error(report.budget)} allowed")
    _fill(facts, "smallest cosine", f"{report.cosine:.6f}")
    if report.noise:
        _fill(facts, "own noise", f"{figures.error(report.noise)} between two runs of the unmodified model")
    if report.diverged_at:
        _fill(facts, "first parts at", report.diverged_at)
    console.print(facts)
    if report.checks:
        ordered = sorted(report.checks, key=lambda c: c.passed)
        table = _table("", "Gate", "Compared", "Error", "Allowed", right=(3, 4))
        for check in ordered[:_SHOWN_CHECKS]:
            name = Text(check.name + (f" @ {check.case}" if check.case else ""))
            if check.detail:
                name.append(f"\n{check.detail}", style="yellow")
            mark = Text("ok", style="green") if check.passed else Text("FAIL", style="red")
            _fill(table, mark, str(check.gate), name, figures.error(check.error), figures.error(check.budget))
        console.print(table)
        if len(ordered) > _SHOWN_CHECKS:
            console.print(f"and {len(ordered) - _SHOWN_CHECKS} more checks that passed or failed by less")
    for sentence in report.unchecked:
        console.print(Text(f"not checked: {sentence}", style="yellow"))


def _key_facts(plan: Plan) -> Table:
    facts = _facts()
    _fill(facts, "model", f"{plan.workload.name or 'model'} ({plan.workload.mode}) on {plan.device.name}")
    if not plan.device.verified:
        _fill(facts, "", "hardware support not verified: its contract suite has not run on this kind of device")
    measurement = plan.chosen.measurement
    if plan.candidate.steps:
        _fill(facts, "chosen", reading.short(plan.candidate))
    if measurement is not None and plan.candidate.steps:
        before, after = measurement.baseline_median_ms, measurement.median_ms
        _fill(facts, "time", f"{figures.milliseconds(before)} -> {figures.milliseconds(after)}")
        if measurement.peak_bytes is not None and measurement.baseline_peak_bytes is not None:
            change = f"{figures.size(measurement.baseline_peak_bytes)} -> {figures.size(measurement.peak_bytes)}"
            _fill(facts, "peak memory", change)
        calls = measurement.break_even_calls
        paid = "" if calls is None else f", paid back after {calls:,} calls"
        _fill(facts, "compile", figures.seconds(measurement.compile_seconds) + paid)
    for memory in plan.memory:
        source = "" if memory.fits is None else f"; by the compiler for {memory.place}, unverified on hardware"
        _fill(facts, "memory", f"{memory.whose} {memory_verdict(memory)}{source}")
    if plan.search_seconds:
        _fill(facts, "search", figures.seconds(plan.search_seconds))
    return facts


def _trials(plan: Plan, *, wide: bool) -> Table:
    columns = ["", "Candidate", "Speed-up [95 %]", "Error", "Peak", "Compile", *(["Pays after"] if wide else [])]
    table = _table(*columns, right=tuple(range(2, len(columns))))
    for trial in reading.rank(plan):
        chosen = trial.candidate == plan.candidate
        again = " beside itself" if trial.measurement and not trial.candidate.steps else ""
        label = Text(reading.short(trial.candidate) + again, style="bold green" if chosen else "")
        cells = _cells(trial)
        _fill(table, "*" if chosen else "", label, *(cells if wide else cells[:-1]))
    return table


def _cells(trial: Trial) -> list[Text | str]:
    measurement, error = trial.measurement, reading.measured_error(trial)
    speed: Text | str = figures.interval(measurement.ratio) if measurement else styled_status(trial.status)
    if measurement and trial.status is not Status.OK:
        speed = Text.assemble(styled_status(trial.status), f" at {figures.times(measurement.ratio.value)}")
    if measurement is None and not trial.candidate.steps and trial.status is Status.OK:
        speed = figures.times(1.0)
    peak = figures.size(measurement.peak_bytes) if measurement and measurement.peak_bytes is not None else "-"
    compiled = figures.seconds(measurement.compile_seconds) if measurement and measurement.compile_seconds else "-"
    calls = measurement.break_even_calls if measurement and measurement.compile_seconds else None
    pays = "never" if measurement and measurement.compile_seconds and calls is None else "-"
    return [
        speed,
        figures.error(error[0]) if error else "-",
        peak,
        compiled,
        pays if calls is None else f"{calls:,} calls",
    ]


def _table(*columns: str, right: tuple[int, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for index, name in enumerate(columns):
        number = index in right
        table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def _fill(table: Table, *cells: Text | str) -> None:
    """Add a row of plain text: rich would read a bare string as markup, and names come from users."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def _facts() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _section(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title, style="bold underline" if console.color_system else "bold"))


def _item(console: Console, name: Text, reason: str, *, fix: str = "", status: Status | None = None) -> None:
    body = Text("- ")
    body.append_text(name)
    if status is not None and status is not Status.OK:
        body = Text.assemble(body, " (", styled_status(status), ")")
    body.append(f": {reason}")
    if fix:
        body.append("\nfix: ", style="cyan")
        body.append(fix, style="cyan")
    first, *rest = body.split("\n", allow_blank=False)
    console.print(_hanging(first, "  "))
    for line in rest:
        console.print(Padding(line, (0, 0, 0, 4)))


def _hanging(line: Text, indent: str) -> Table:
    grid = Table.grid()
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(line[: len(indent)], line[len(indent) :])
    return grid


def _shortened(labels: list[str]) -> str:
    more = len(labels) - _SHOWN_UNTRIED
    return "; ".join(labels[:_SHOWN_UNTRIED]) + (f"; and {more} more" if more > 0 else "")


def _source(spec: DeviceSpec, field: str) -> str:
    found = [v for k, v in spec.sources.items() if field in k]
    return f" ({found[0]})" if found else ""


def _can_encode(console: Console, text: str) -> bool:
    try:
        text.encode(console.encoding)
    except (UnicodeError, LookupError):
        return False
    return True
