"""A guard's comparison for people and machines: terminal, JSON, Markdown, JUnit XML and Prometheus text.

Names, reasons and kernels come from users' code and from what crashed, so each format escapes them its own way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any
from xml.etree import ElementTree as ET

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kernel_pytorch.core.types import Ratio, Verdict
from kernel_pytorch.report import figures
from kernel_pytorch.report.compared import (
    Compared,
    Side,
    change,
    fails,
    headline,
    median_ms,
    one_line,
    rows,
    summary,
)

__all__ = [
    "SCHEMA_VERSION",
    "as_json",
    "as_junit",
    "as_markdown",
    "as_prometheus",
    "as_quotation",
    "as_text",
    "render_comparison",
]

SCHEMA_VERSION = 1
"""Of the JSON object: it grows when a field changes its meaning or goes, not when one is added."""

_STYLES = {
    Verdict.PASS: "bold green",
    Verdict.FAIL: "bold red",
    Verdict.WRONG: "bold red",
    Verdict.STALE: "bold yellow",
    Verdict.INCONCLUSIVE: "bold yellow",
}
_MARKS = {
    Verdict.PASS: "✅",
    Verdict.FAIL: "❌",
    Verdict.WRONG: "❌",
    Verdict.STALE: "⚠️",
    Verdict.INCONCLUSIVE: "❔",
}
_SHOWN_CULPRITS = 5
_MOST_COMMENT = 60_000
"""GitHub refuses a comment of more than 65,536 characters."""


def render_comparison(compared: Compared, console: Console) -> None:
    """Print the verdict, the two sides, what probably caused a slowdown, and how to run it again."""
    title = Text.assemble((str(compared.verdict), _STYLES[compared.verdict]), "  ", (one_line(compared.name), "bold"))
    console.print(title.append(f": {headline(compared)}"), soft_wrap=True)
    console.print(Text(one_line(compared.reason, 1000)), soft_wrap=True)  # it may name a command to copy
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    table.add_column("", style="dim")
    for side in (compared.base, compared.head):
        table.add_column(Text(one_line(side.label, 60)), overflow="fold")
    for row in rows(compared):
        table.add_row(*(Text(one_line(cell, 200)) for cell in row))
    if compared.change is not None:
        interval = f"change, {compared.change.confidence * 100:g} %"
        table.add_row(Text(interval), Text(""), Text(change(compared.change), style=_STYLES[compared.verdict]))
    console.print(table)
    for section, lines in (("Most likely", _suspects(compared)), ("Notes", compared.notes)):
        if lines:
            console.print(Text(section, style="bold"))
        for line in lines:
            console.print(Text(f"  - {one_line(line, 1000)}"), soft_wrap=True)
    if compared.command:
        console.print(Text.assemble(("again: ", "dim"), one_line(compared.command, 2000)), soft_wrap=True)


def as_text(compared: Compared, *, width: int = 100) -> str:
    """Return what `render_comparison` prints, without colour."""
    console = Console(width=width, color_system=None, force_terminal=False, highlight=False, legacy_windows=False)
    with console.capture() as captured:
        render_comparison(compared, console)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def as_json(compared: Compared) -> dict[str, Any]:
    """Return everything that is known, raw samples included, as plain JSON values.

    A figure that is not finite is `None`. `schema_version` is `SCHEMA_VERSION`;
    `kernel_pytorch.guard.saved.read_comparisons` reads it back.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "id": compared.id,
        "created": compared.created,
        "kind": compared.kind,
        "name": compared.name,
        "verdict": str(compared.verdict),
        "reason": compared.reason,
        "max_slowdown": _finite(compared.max_slowdown),
        "change": _ratio(compared.change),
        "paired": compared.paired,
        "base": _side(compared.base),
        "head": _side(compared.head),
        "base_samples_ms": [_finite(s) for s in compared.base_samples_ms],
        "head_samples_ms": [_finite(s) for s in compared.head_samples_ms],
        "notes": list(compared.notes),
        "culprits": [
            {
                "kind": c.kind,
                "what": c.what,
                "share": _finite(c.share),
                "evidence": {k: v if isinstance(v, str) else _finite(v) for k, v in c.evidence.items()},
            }
            for c in compared.culprits
        ],
        "command": compared.command,
        "seconds": _finite(compared.seconds),
    }


def as_markdown(compared: Sequence[Compared], *, title: str = "Performance") -> str:
    """Return a comment for a pull request: one table, and the details of what did not pass below it.

    Foreign text neither ends a cell, nor becomes HTML, a link, a mention or a reference to an issue.
    """
    lines = [f"### {_escaped(title)}: {summary(compared)}", ""]
    if compared:
        lines += ["| | what | change of the time | allowed | base | head |", "|---|---|---|--:|--:|--:|"]
    for c in compared:
        base, head = (_milliseconds(s) for s in (c.base_samples_ms, c.head_samples_ms))
        cells = (f"{_MARKS[c.verdict]} {c.verdict}", _code(c.name), change(c.change))
        lines.append(f"| {' | '.join(cells)} | {figures.percent(c.max_slowdown)} | {base} | {head} |")
    text = "\n".join(lines)
    left = 0
    for c in compared:
        details = "" if c.verdict is Verdict.PASS and not c.notes else "\n" + "\n".join(_details(c))
        if len(text) + len(details) > _MOST_COMMENT:
            left += 1
            continue
        text += details
    if len(text) > _MOST_COMMENT:
        text = text[:_MOST_COMMENT].rpartition("\n")[0] + "\n\nCut: too long for a comment."
    if left:
        text += f"\n\nDetails of {left} more are in the artefacts."
    return text + "\n\n<sub>Time of head over time of base with its interval; above 0 % is slower.</sub>\n"


def as_quotation(text: str, *, most: int = 4000) -> str:
    """Return the end of what a program said as a block of Markdown that nothing in it can end."""
    lines = [one_line(line) for line in text.strip()[-most:].splitlines()]
    fence = "`" * max(3, 1 + max((len(run) for line in lines for run in re.findall("`+", line)), default=0))
    return "\n".join([f"{fence}text", *lines, fence]) + "\n"


def as_junit(compared: Sequence[Compared], *, inconclusive: str = "pass") -> str:
    """Return JUnit XML, one test case a comparison.

    Args:
        compared: What to write.
        inconclusive: `fail` makes an undecided comparison a failure; else it is shown as skipped, with its reason.
    """
    red = [c for c in compared if fails(c.verdict, inconclusive=inconclusive)]
    undecided = [c for c in compared if c.verdict is Verdict.INCONCLUSIVE and c not in red]
    counts = {
        "name": "kpt",
        "tests": str(len(compared)),
        "failures": str(len(red)),
        "errors": "0",
        "skipped": str(len(undecided)),
        "time": f"{sum(c.seconds for c in compared):.3f}",
    }
    suites = ET.Element("testsuites")
    suite = ET.SubElement(suites, "testsuite", counts)
    if compared:
        suite.set("timestamp", _xml(compared[0].created))
    for c in compared:
        attributes = {"classname": f"kpt.{c.kind}", "name": c.name, "time": f"{c.seconds:.3f}"}
        case = ET.SubElement(suite, "testcase", {k: _xml(v) for k, v in attributes.items()})
        properties = ET.SubElement(case, "properties")
        for name, value in _properties(c).items():
            ET.SubElement(properties, "property", {"name": name, "value": _xml(value)})
        message = {"message": _xml(one_line(f"{c.verdict}: {c.reason}")), "type": str(c.verdict)}
        if c in red:
            ET.SubElement(case, "failure", message).text = _xml(as_text(c))
        elif c in undecided:
            ET.SubElement(case, "skipped", message)
        ET.SubElement(case, "system-out").text = _xml(as_text(c))
    ET.indent(suites)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"


def as_prometheus(compared: Sequence[Compared]) -> str:
    """Return the text exposition format, as node_exporter's textfile collector and a Pushgateway take it.

    Where a name was compared more than once, the latest counts: a series may occur once.
    """
    latest: dict[tuple[str, str], Compared] = {}
    for c in sorted(compared, key=lambda c: _timestamp(c.created) or 0.0):
        latest[c.kind, c.name] = c
    lines: list[str] = []
    for name, text, values in _METRICS:
        series = [(c, labels, value) for c in latest.values() for labels, value in values(c) if value is not None]
        if series:
            lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge"]
        for c, labels, value in series:
            shown = {"kind": c.kind, "name": c.name, **labels}
            inner = ",".join(f'{k}="{_label(v)}"' for k, v in shown.items())
            lines.append(f"{name}{{{inner}}} {_number(value)}")
    return "\n".join(lines) + "\n" if lines else ""


_Values = Iterator[tuple[dict[str, str], float | None]]


def _verdicts(c: Compared) -> _Values:
    for verdict in Verdict:
        yield {"verdict": str(verdict)}, float(c.verdict is verdict)


def _changes(c: Compared) -> _Values:
    if c.change is not None:
        for bound in ("value", "low", "high"):
            yield {"bound": bound}, getattr(c.change, bound)


def _times(c: Compared) -> _Values:
    for side, samples in (("base", c.base_samples_ms), ("head", c.head_samples_ms)):
        median = median_ms(samples)
        yield {"side": side}, None if median is None else median / 1e3


def _counts(c: Compared) -> _Values:
    for side, samples in (("base", c.base_samples_ms), ("head", c.head_samples_ms)):
        yield {"side": side}, float(len(samples))


def _peaks(c: Compared) -> _Values:
    for side, facts in (("base", c.base), ("head", c.head)):
        yield {"side": side}, None if facts.peak_bytes is None else float(facts.peak_bytes)


_METRICS: tuple[tuple[str, str, Callable[[Compared], _Values]], ...] = (
    ("kpt_verdict", "Whether the last comparison ended with this verdict (1) or not (0).", _verdicts),
    ("kpt_change_ratio", "Time of head over time of base, and the bounds of its interval.", _changes),
    ("kpt_max_slowdown_ratio", "Largest slowdown that is allowed.", lambda c: iter([({}, c.max_slowdown)])),
    ("kpt_time_seconds", "Median time of one call.", _times),
    ("kpt_samples", "Samples taken.", _counts),
    ("kpt_peak_memory_bytes", "Peak memory of one call.", _peaks),
    ("kpt_duration_seconds", "What the comparison took.", lambda c: iter([({}, c.seconds)])),
    ("kpt_timestamp_seconds", "When the comparison was made.", lambda c: iter([({}, _timestamp(c.created))])),
)


def _suspects(compared: Compared) -> list[str]:
    lines = []
    for c in compared.culprits[:_SHOWN_CULPRITS]:
        untold = c.share is not None and "of the slowdown" not in c.what
        lines.append(
            f"{c.kind}: {c.what}" + (f" ({figures.percent(c.share or 0.0)} of the slowdown)" if untold else "")
        )
    if left := len(compared.culprits) - _SHOWN_CULPRITS:
        lines += [f"and {left} more"] if left > 0 else []
    return lines


def _details(compared: Compared) -> Iterator[str]:
    yield f"\n<details{'' if compared.verdict is Verdict.PASS else ' open'}>"
    yield f"<summary>{compared.verdict}: {_html(compared.name)}</summary>\n"
    yield f"{_escaped(compared.reason)}\n"
    for section, lines in (("Most likely", _suspects(compared)), ("Notes", compared.notes)):
        if lines:
            yield f"**{section}**\n"
            yield from (f"- {_escaped(line)}" for line in lines)
            yield ""
    yield f"| | {_code(compared.base.label)} | {_code(compared.head.label)} |"
    yield "|---|---|---|"
    for name, base, head in rows(compared):
        yield f"| {_escaped(name)} | {_code(base)} | {_code(head)} |"
    if compared.command:
        yield f"\nAgain: {_code(compared.command, 2000)}"
    yield "\n</details>"


def _milliseconds(samples: Sequence[float]) -> str:
    median = median_ms(samples)
    return "-" if median is None else figures.milliseconds(median)


def _properties(compared: Compared) -> Mapping[str, str]:
    ratio = compared.change
    bounds = {} if ratio is None else {"change": ratio.value, "change_low": ratio.low, "change_high": ratio.high}
    return {
        "kpt.verdict": str(compared.verdict),
        **{f"kpt.{k}": f"{v:.6g}" for k, v in bounds.items()},
        "kpt.max_slowdown": f"{compared.max_slowdown:g}",
        "kpt.samples": str(len(compared.head_samples_ms)),
        "kpt.id": compared.id,
    }


def _code(text: str, most: int = 200) -> str:
    """Return foreign text as a code span that nothing in it can end, also in the cell of a table."""
    shown = one_line(text, most)
    if not shown:
        return "-"
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if shown[0] == "`" or shown[-1] == "`" else ""
    # A backslash before a bar would be read as its escape, so bars look like bars and are none.
    return fence + pad + shown.replace("|", "¦") + pad + fence


def _html(text: str) -> str:
    """Return foreign text for HTML, where a break after a mark keeps mentions, references and links from forming."""
    shown = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
    return _broken(shown)


def _escaped(text: str) -> str:
    """Return foreign text for Markdown, every mark of it plain."""
    shown = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _broken(re.sub(r"([\\`*_\[\]#!|~$])", r"\\\1", shown))


def _broken(text: str) -> str:
    text = re.sub(r"(?<=[@#])(?=\w)", "\u200b", text)
    text = re.sub(r"(?i)\b([a-z][a-z0-9+.-]*):(?=/)", "\\1:\u200b", text)
    return re.sub(r"(?i)\b(www|GH)(?=[.-])", "\\1\u200b", text)


def _xml(text: str) -> str:
    """Return text without the characters that XML 1.0 has no way to write."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return re.sub("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def _label(text: str) -> str:
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\r", " ")
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return "NaN" if math.isnan(value) else repr(value)


def _timestamp(created: str) -> float | None:
    try:
        return datetime.fromisoformat(created).timestamp()
    except ValueError:
        return None


def _ratio(ratio: Ratio | None) -> dict[str, float | None] | None:
    if ratio is None:
        return None
    return {name: _finite(getattr(ratio, name)) for name in ("value", "low", "high", "confidence")}


def _side(side: Side) -> dict[str, Any]:
    return {
        "label": side.label,
        "revision": side.revision,
        "dirty": side.dirty,
        "python": side.python,
        "software": dict(side.software),
        "device_key": side.device_key,
        "fingerprint": side.fingerprint,
        "telemetry": {k: _finite(v) for k, v in side.telemetry.items()},
        "kernels_ms": {k: _finite(v) for k, v in side.kernels_ms.items()},
        "peak_bytes": side.peak_bytes,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
