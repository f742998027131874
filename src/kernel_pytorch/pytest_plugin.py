"""The pytest plugin: a fixture that compares times, a marker that says how much slower is too slow.

    @pytest.mark.kpt(max_slowdown=0.05)
    def test_attention_is_not_slower(kpt):
        kpt.compare(base=lambda: old(x), head=lambda: new(x))

Why it looks like this: a test says what two things are compared and how much slower is too slow, and nothing about
rounds, warm-ups or statistics, which are the plugin's business: it takes turns between the sides and stops as soon as
the verdict is certain. There is no stored time to compare with, since a stored time is worth nothing on another
machine, or on the same one tomorrow. The three methods differ only in where the other side comes from: `compare` (a
function beside it), `against` (another git revision), `check` (the unmodified model of a plan). Each asserts by itself,
so the test needs no line more, and returns its `Comparison` for one that wants it.

pytest loads this module at every start, whoever uses it: it imports the standard library and pytest alone, and what
measures only when a test asks for it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kernel_pytorch.guard.types import Comparison

__all__ = ["Kpt", "KptWarning"]

_POLICIES = ("pass", "fail", "skip")
_INI = {
    "kpt_history": "where comparisons are recorded: `default`, a database URL, or nothing (the default: not recorded)",
    "kpt_base": "git revision that `kpt.against` compares with where neither the test nor --kpt-base names one",
    "kpt_inconclusive": "what an undecided comparison counts as: pass (the default), fail or skip",
}
_MARKER = (
    "kpt(max_slowdown=0.03, max_seconds=60, max_pairs=400, inconclusive='pass', name=''): limits of the comparisons "
    "that a test makes with the `kpt` fixture"
)


class KptWarning(pytest.PytestWarning):
    """Something about a comparison that does not fail the test: it could not be recorded, say."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a marker sets."""

    max_slowdown: float = 0.03
    max_seconds: float = 60.0
    max_pairs: int = 400
    inconclusive: str = "pass"
    name: str = ""

    def but(self, where: str, changes: Mapping[str, Any]) -> Limits:
        """Return them with changes.

        Raises:
            ValueError: A name that is none of them, or a value that cannot be; `where` says whose it was.
        """
        known = {f.name for f in fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise ValueError(f"{where} does not know {', '.join(unknown)}; it takes {', '.join(sorted(known))}")
        changed = replace(self, **changes)
        for name in ("max_slowdown", "max_seconds", "max_pairs"):
            value = getattr(changed, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < float("inf"):
                raise ValueError(f"{where}: {name} must be a number above 0, got {value!r}")
        if changed.inconclusive not in _POLICIES:
            raise ValueError(f"{where}: inconclusive must be one of {', '.join(_POLICIES)}")
        return changed


class Kpt:
    """What the `kpt` fixture gives: each method compares, records what came of it, and fails the test if slower."""

    def __init__(self, node: pytest.Item, limits: Limits) -> None:
        self._node = node
        self._limits = limits
        self.comparisons: list[Comparison] = []
        """What was compared so far in this test."""

    def compare(
        self, base: Callable[[], Any], head: Callable[[], Any], *, device: str = "", **changes: Any
    ) -> Comparison:
        """Fail the test if `head` is slower than `base`; both are called in turns, in this process.

        Args:
            base: One call of the old way, without arguments: `lambda: old(x)`.
            head: One call of the new way, on the same inputs.
            device: Where they run; empty is the GPU where they use one, else the CPU.
            **changes: What the marker takes, for this comparison alone.
        """
        from kernel_pytorch.guard.calls import compare_calls

        limits = self._limits_with(changes)
        return self._judge(
            compare_calls(
                base,
                head,
                name=self._name(limits),
                max_slowdown=limits.max_slowdown,
                max_seconds=limits.max_seconds,
                max_pairs=int(limits.max_pairs),
                device=device,
                command=self._command(),
            ),
            limits,
        )

    def _limits_with(self, changes: Mapping[str, Any]) -> Limits:
        return self._limits.but("kpt", changes)

    def _name(self, limits: Limits) -> str:
        """Return the test's node id, or the name it was given, and a number from the second comparison on."""
        name = limits.name or self._node.nodeid
        taken = sum(c.name == name or c.name.startswith(f"{name} (") for c in self.comparisons)
        return f"{name} ({taken + 1})" if taken else name

    def _command(self) -> str:
        return shlex.join(["pytest", self._node.nodeid])

    def _judge(self, comparison: Comparison, limits: Limits) -> Comparison:
        from kernel_pytorch.core.types import Verdict
        from kernel_pytorch.report.comparison import as_text

        if beside := _other_workers(self._node.config):
            comparison = replace(comparison, notes=(*comparison.notes, beside))
        self.comparisons.append(comparison)
        _record(self._node, comparison)
        # What `record_property` does, without its warning of JUnit's second family, which an ordinary run would show.
        self._node.user_properties += _properties(comparison, len(self.comparisons))
        undecided = comparison.verdict is Verdict.INCONCLUSIVE
        if undecided and limits.inconclusive == "skip":
            pytest.skip(f"kpt: {comparison.reason}")
        if comparison.verdict is not Verdict.PASS and not (undecided and limits.inconclusive == "pass"):
            pytest.fail(f"kpt: {as_text(comparison)}", pytrace=False)
        return comparison


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare options and ini options."""
    group = parser.getgroup("kpt", "performance comparisons (kernel_pytorch)")
    group.addoption("--kpt-base", metavar="REV", help="git revision that `kpt.against` compares with")
    group.addoption("--kpt-inconclusive", choices=_POLICIES, help="what an undecided comparison counts as")
    group.addoption("--kpt-history", metavar="URL", help="record comparisons here; `none` records nothing")
    group.addoption(
        "--kpt-report",
        metavar="FILE",
        action="append",
        default=[],
        help="write all comparisons: .md (for a pull request), .json, .xml (JUnit) or .prom; may be repeated",
    )
    for name, text in _INI.items():
        parser.addini(name, text, default="")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker, and collect what is reported."""
    config.addinivalue_line("markers", _MARKER)
    for path in config.getoption("kpt_report"):
        if Path(path).suffix not in _WRITERS:
            raise pytest.UsageError(f"--kpt-report {path}: the name must end with one of {', '.join(_WRITERS)}")
    if not hasattr(config, "workerinput"):  # an xdist worker: its controller reports
        config.pluginmanager.register(_Reporter(config), "kpt-reporter")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the fixture, so that `-m kpt` and `-m 'not kpt'` choose by it."""
    for item in items:
        if "kpt" in getattr(item, "fixturenames", ()) and item.get_closest_marker("kpt") is None:
            item.add_marker(pytest.mark.kpt)


@pytest.fixture
def kpt(request: pytest.FixtureRequest) -> Kpt:
    """Compare times: `kpt.compare(base, head)`, `kpt.against(revision, target)`, `kpt.check(plan, target)`."""
    node = request.node
    try:
        limits = _limits(node)
    except ValueError as error:
        pytest.fail(f"{node.nodeid}: {error}", pytrace=False)
    node.stash[_FIXTURE] = made = Kpt(node, limits)
    return made


_FIXTURE = pytest.StashKey[Kpt]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put a test's comparisons on its report, where they also reach the controller of pytest-xdist."""
    report = yield
    made = item.stash.get(_FIXTURE, None)
    if report.when == "teardown" and made is not None and made.comparisons:
        from kernel_pytorch.report.comparison import as_json

        report.kpt = [as_json(c) for c in made.comparisons]  # type: ignore[attr-defined]
    return report


class _Reporter:
    """Keeps what was compared, prints a line for each at the end, and writes the reports."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._comparisons: list[Comparison] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if told := getattr(report, "kpt", ()):
            from kernel_pytorch.guard.saved import as_comparison

            self._comparisons += map(as_comparison, told)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self._comparisons:
            return
        from kernel_pytorch.report.compared import change, one_line, summary

        terminalreporter.section(f"kpt: {summary(self._comparisons)}")
        for c in self._comparisons:
            terminalreporter.write_line(f"{c.verdict!s:<12} {one_line(c.name)}  {change(c.change)}")
            if c.verdict != "PASS":
                terminalreporter.write_line(f"{'':<12} {one_line(c.reason)}")

    def pytest_sessionfinish(self) -> None:
        for path in self._config.getoption("kpt_report"):
            file = self._config.invocation_params.dir / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(_WRITERS[file.suffix](self._comparisons), encoding="utf-8")


def _limits(node: pytest.Item) -> Limits:
    """Return what the markers say, the nearest first, over what the command line and the ini file say."""
    policy = node.config.getoption("kpt_inconclusive") or node.config.getini("kpt_inconclusive")
    limits = Limits().but("ini option kpt_inconclusive", {"inconclusive": policy} if policy else {})
    for marker in reversed(list(node.iter_markers("kpt"))):
        if marker.args:
            raise ValueError(f"@pytest.mark.kpt takes names only, got {marker.args[0]!r}: kpt(max_slowdown=0.03)")
        limits = limits.but("@pytest.mark.kpt", marker.kwargs)
    return limits


def _record(node: pytest.Item, comparison: Comparison) -> None:
    """Record a comparison into the history, where one is configured; what goes wrong there fails no test."""
    where = node.config.getoption("kpt_history") or node.config.getini("kpt_history")
    if not where or where == "none":
        return
    from kernel_pytorch.guard.history import History

    try:
        History(None if where == "default" else where).record(comparison)
    except (OSError, ValueError) as error:
        node.warn(KptWarning(f"not recorded in {where}: {error}"))


def _properties(comparison: Comparison, number: int) -> Iterator[tuple[str, str]]:
    """Yield the JUnit properties of a comparison; from the second of a test on, numbered."""
    prefix = "kpt" if number == 1 else f"kpt{number}"
    yield f"{prefix}.verdict", str(comparison.verdict)
    if comparison.change is not None:
        yield f"{prefix}.change", f"{comparison.change.value:.6g}"
        yield f"{prefix}.change_low", f"{comparison.change.low:.6g}"
        yield f"{prefix}.change_high", f"{comparison.change.high:.6g}"
    yield f"{prefix}.max_slowdown", f"{comparison.max_slowdown:g}"
    yield f"{prefix}.pairs", str(len(comparison.head_samples_ms))
    yield f"{prefix}.id", comparison.id


def _other_workers(config: pytest.Config) -> str:
    count = int(getattr(config, "workerinput", {}).get("workercount", 1))
    return f"taken beside {count - 1} other workers of pytest-xdist, which is noise" if count > 1 else ""


def _as_markdown(comparisons: list[Comparison]) -> str:
    from kernel_pytorch.report.comparison import as_markdown

    return as_markdown(comparisons)


def _as_json(comparisons: list[Comparison]) -> str:
    from kernel_pytorch.report.comparison import SCHEMA_VERSION, as_json

    data = {"schema_version": SCHEMA_VERSION, "comparisons": [as_json(c) for c in comparisons]}
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def _as_junit(comparisons: list[Comparison]) -> str:
    from kernel_pytorch.report.comparison import as_junit

    return as_junit(comparisons)


def _as_prometheus(comparisons: list[Comparison]) -> str:
    from kernel_pytorch.report.comparison import as_prometheus

    return as_prometheus(comparisons)


_WRITERS: dict[str, Callable[[list[Comparison]], str]] = {
    ".md": _as_markdown,
    ".json": _as_json,
    ".xml": _as_junit,
    ".prom": _as_prometheus,
}
