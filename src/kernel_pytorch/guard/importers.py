"""Results of pytest-benchmark and of asv, judged.

Both tools time one revision after the other, so their samples are judged as series that were not taken side by side:
INCONCLUSIVE unless their drift can be bounded, with how to take them properly. That is what such files can tell. Their
past belongs into the history all the same, and nobody changes tools in one day.

Formats: what pytest-benchmark 5 writes (`--benchmark-json`, `.benchmarks/`), and asv's results of version 2 as
https://asv.readthedocs.io/en/stable/dev.html describes them; their columns are named in the file.
"""

from __future__ import annotations

import datetime as dt
import itertools
import math
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel_pytorch.core.types import Ratio, Verdict
from kernel_pytorch.guard.saved import ResultsError, load_json
from kernel_pytorch.guard.types import Comparison, SideFacts
from kernel_pytorch.validation.regression import judge_series

__all__ = ["Results", "Timed", "compare_results", "is_results", "read_results"]

_ASV_VERSIONS = (2, 3)
_ASV_TIMES = re.compile(r"(?:.*\.)?(?:(?:Time(?:raw)?[A-Z_].+)|(?:time(?:raw)?_.+))")
"""asv's own rule of which benchmarks are times, in seconds."""
_ORIGIN = uuid.UUID("5f0c2e0e-6d5b-4f0e-9c57-0f1d0c1c1d3a")


@dataclass(frozen=True, slots=True)
class Timed:
    """One benchmark of a file.

    Attributes:
        samples_ms: In time order, a call each; one value where the file holds only a summary.
        summary: Whether there are no samples but a median.
    """

    samples_ms: tuple[float, ...]
    summary: bool = False


@dataclass(frozen=True, slots=True)
class Results:
    """What a file holds.

    Attributes:
        source: `pytest-benchmark` or `asv`.
        path: The file.
        benchmarks: By name, with the parameters as the tool writes them.
        left_out: Name and reason of what is no time, or failed.
        facts: The revision, the machine and its software.
        created: When it was measured; UTC, ISO 8601.
    """

    source: str
    path: str
    benchmarks: Mapping[str, Timed]
    left_out: Mapping[str, str]
    facts: SideFacts
    created: str


def is_results(data: Any) -> bool:
    """Return whether JSON values look like results of one of the tools, well-formed or not."""
    return isinstance(data, dict) and _reader(data) is not None


def read_results(path: Path | str, *, label: str = "") -> Results:
    """Return the times of a file of pytest-benchmark or asv.

    Args:
        path: The file.
        label: What the side is called; by default the name of the file.

    Raises:
        ResultsError: No such file, no JSON, no such results, or damaged ones; the message says where.
    """
    data, file = load_json(path), Path(path)
    reader = _reader(data) if isinstance(data, dict) else None
    if reader is None:
        raise ResultsError(
            f"{file} holds no results of pytest-benchmark (an object with `benchmarks` and `machine_info`) "
            "nor of asv (an object with `result_columns` and `results`)",
            fix="pytest --benchmark-json FILE; of asv, a file .asv/results/MACHINE/COMMIT-ENVIRONMENT.json",
        )
    return reader(data, str(file), label or file.stem)


def compare_results(
    base: Path | str, head: Path | str, *, max_slowdown: float = 0.03, command: str = ""
) -> tuple[Comparison, ...]:
    """Judge every benchmark of two files, by name; what only one of them has is INCONCLUSIVE and says so.

    The same two files give comparisons of the same ids, so that a history which gets them twice has them once.

    Raises:
        ResultsError: A file that cannot be used, or two without a name in common.
        ValueError: A `max_slowdown` not above 0.
    """
    old, new = read_results(base, label="base"), read_results(head, label="head")
    if not set(old.benchmarks) & set(new.benchmarks):
        raise ResultsError(
            f"{old.path} ({old.source}, {_some(old)}) and {new.path} ({new.source}, {_some(new)}) "
            "have no benchmark in common",
            fix="give two files of the same suite",
        )
    names = dict.fromkeys([*old.benchmarks, *new.benchmarks])
    return tuple(_comparison(name, old, new, max_slowdown, command) for name in names)


def _comparison(name: str, old: Results, new: Results, max_slowdown: float, command: str) -> Comparison:
    base, head = old.benchmarks.get(name), new.benchmarks.get(name)
    change: Ratio | None = None
    verdict, notes = Verdict.INCONCLUSIVE, list(_machines(old, new))
    if base is None or head is None:
        lacking = old if base is None else new
        reason = f"{lacking.path} has no time of it: {lacking.left_out.get(name, 'it is not there')}"
    elif base.summary or head.summary:
        lacking, how = (old, _HOW[old.source]) if base.summary else (new, _HOW[new.source])
        change = Ratio(head.samples_ms[0] / base.samples_ms[0], 0.0, math.inf)
        reason = f"{lacking.path} has no samples of it, only their median, which bounds nothing: {how}"
    else:
        judged = judge_series(base.samples_ms, head.samples_ms, max_slowdown=max_slowdown)
        verdict, reason, change = judged.verdict, judged.reason, judged.change
        notes += judged.notes
    samples = [() if one is None else one.samples_ms for one in (base, head)]
    key = repr((name, old.source, old.facts.revision, new.facts.revision, old.created, new.created, samples))
    return Comparison(
        kind="compare",
        name=name,
        verdict=verdict,
        reason=reason,
        max_slowdown=max_slowdown,
        base=old.facts,
        head=new.facts,
        created=new.created,
        id=uuid.uuid5(_ORIGIN, key).hex,
        change=change,
        base_samples_ms=samples[0],
        head_samples_ms=samples[1],
        paired=False,
        notes=tuple(notes),
        command=command,
    )


_HOW = {
    "pytest-benchmark": "let it keep them (--benchmark-save-data)",
    "asv": "let it keep them (asv run --record-samples)",
}


def _machines(old: Results, new: Results) -> Iterator[str]:
    for what in ("machine", "cpu"):
        pair = [one.facts.software.get(what, "") for one in (old, new)]
        if pair[0] != pair[1]:
            yield f"taken on different machines: {what} {pair[0] or 'unknown'} and {pair[1] or 'unknown'}"


def _some(results: Results) -> str:
    names = list(results.benchmarks)
    return f"for example {names[0]!r}" if names else "which has no times"


_Reader = Callable[[Mapping[str, Any], str, str], Results]


def _reader(data: Mapping[str, Any]) -> _Reader | None:
    if "benchmarks" in data and "machine_info" in data:
        return _pytest_benchmark
    if "result_columns" in data or ("results" in data and "commit_hash" in data):
        return _asv
    return None


def _pytest_benchmark(data: Mapping[str, Any], path: str, label: str) -> Results:
    at = _At(path)
    benchmarks: dict[str, Timed] = {}
    left_out: dict[str, str] = {}
    for i, one in enumerate(at.of(data, "benchmarks", list)):
        here = _At(f"{path}: benchmarks[{i}]")
        name = here.of(here.object(one), "fullname", str)
        if name in benchmarks or name in left_out:
            raise ResultsError(f"{here.where}: there is a {name!r} already")
        stats = here.of(one, "stats", dict)
        raw = stats.get("data")
        if raw:
            benchmarks[name] = Timed(here.times(raw, "stats.data"))
        elif one.get("has_error"):
            left_out[name] = "it failed"
        else:
            benchmarks[name] = Timed(here.times([stats.get("median")], "stats.median"), summary=True)
    machine = at.of(data, "machine_info", dict)
    cpu = machine.get("cpu")
    commit = data.get("commit_info")
    commit = commit if isinstance(commit, dict) else {}
    software = {
        "python": machine.get("python_version"),
        "machine": machine.get("node"),
        "cpu": cpu.get("brand_raw") if isinstance(cpu, dict) else None,
        "system": f"{machine.get('system', '')} {machine.get('release', '')}".strip(),
        "pytest-benchmark": data.get("version"),
    }
    facts = SideFacts(
        label=label,
        revision=_revision(commit.get("id")),
        dirty=bool(commit.get("dirty")),
        software=_texts(software),
    )
    return Results("pytest-benchmark", path, benchmarks, left_out, facts, at.moment(data.get("datetime")))


def _asv(data: Mapping[str, Any], path: str, label: str) -> Results:
    at = _At(path)
    if data.get("version") not in _ASV_VERSIONS:
        raise ResultsError(
            f"{path}: results of asv of version {data.get('version')!r}, expected one of {_ASV_VERSIONS}",
            fix="asv update",
        )
    columns = at.of(data, "result_columns", list)
    benchmarks: dict[str, Timed] = {}
    left_out: dict[str, str] = {}
    started = []
    for name, values in at.of(data, "results", dict).items():
        here = _At(f"{path}: results[{name!r}]")
        if not isinstance(values, list):
            raise ResultsError(f"{here.where} is {_kind(values)}, expected an array")
        row = dict(zip(columns, values, strict=False))
        if isinstance(row.get("started_at"), int | float):
            started.append(float(row["started_at"]))
        if not _ASV_TIMES.fullmatch(name):
            left_out[name] = "no time"
            continue
        _asv_row(row, name, here, benchmarks, left_out)
    machine = data.get("params")
    machine = machine if isinstance(machine, dict) else {}
    requirements = data.get("requirements")
    software = {
        **(requirements if isinstance(requirements, dict) else {}),
        "python": Path(str(data.get("python") or "")).name,
        **{name: machine.get(key) for name, key in (("machine", "machine"), ("cpu", "cpu"), ("system", "os"))},
    }
    facts = SideFacts(label=label, revision=_revision(data.get("commit_hash")), software=_texts(software))
    created = max(started) if started else data.get("date")
    return Results("asv", path, benchmarks, left_out, facts, at.moment(created))


def _asv_row(
    row: Mapping[str, Any], name: str, here: _At, benchmarks: dict[str, Timed], left_out: dict[str, str]
) -> None:
    """Add one benchmark: one time for each combination of its parameters."""
    values = row.get("result")
    if values is None:
        left_out[name] = "it failed"
        return
    params = row.get("params") or []
    if not isinstance(values, list) or not isinstance(params, list) or not all(isinstance(p, list) for p in params):
        raise ResultsError(f"{here.where}: `result` or `params` is no array")
    combinations = list(itertools.product(*params)) if params else [()]
    if len(values) != len(combinations):
        raise ResultsError(f"{here.where} has {len(values)} results for {len(combinations)} combinations of parameters")
    samples = row.get("samples")
    samples = samples if isinstance(samples, list) and len(samples) == len(values) else [None] * len(values)
    for combination, value, kept in zip(combinations, values, samples, strict=True):
        full = f"{name}({', '.join(map(str, combination))})" if combination else name
        if value is None or (isinstance(value, float) and math.isnan(value)):
            left_out[full] = "it failed" if value is None else "it was skipped"
        elif kept:
            benchmarks[full] = Timed(here.times(kept, "samples"))
        else:
            benchmarks[full] = Timed(here.times([value], "result"), summary=True)


@dataclass(frozen=True, slots=True)
class _At:
    """A place in a file, which messages name."""

    where: str

    def object(self, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise ResultsError(f"{self.where} is {_kind(value)}, expected an object")
        return value

    def of(self, data: Mapping[str, Any], key: str, kind: type) -> Any:
        value = data.get(key)
        if not isinstance(value, kind):
            found = _kind(value) if key in data else "missing"
            raise ResultsError(f"{self.where}: `{key}` is {found}, expected {_KINDS[kind]}")
        return value

    def times(self, values: Any, what: str) -> tuple[float, ...]:
        """Return seconds as milliseconds."""
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise ResultsError(f"{self.where}: `{what}` is {_kind(values)}, expected an array of seconds")
        for i, value in enumerate(values):
            good = isinstance(value, int | float) and not isinstance(value, bool) and 0.0 < value < math.inf
            if not good:
                raise ResultsError(f"{self.where}: `{what}` has {value!r} at {i}, expected a positive number")
        return tuple(float(value) * 1e3 for value in values)

    def moment(self, value: Any) -> str:
        """Return a time stamp, ISO 8601 or milliseconds since 1970, in UTC."""
        try:
            if isinstance(value, int | float):
                moment = dt.datetime.fromtimestamp(value / 1e3, dt.UTC)
            else:
                moment = dt.datetime.fromisoformat(str(value))
        except (ValueError, OverflowError, OSError) as error:
            raise ResultsError(f"{self.where} does not say when it was measured: {value!r}") from error
        known = moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)
        return known.astimezone(dt.UTC).isoformat(timespec="seconds")


_KINDS = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "a number")


def _revision(value: Any) -> str:
    return value if isinstance(value, str) and re.fullmatch("[0-9a-f]{7,64}", value) else ""


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {k: str(v) for k, v in values.items() if v not in (None, "")}
