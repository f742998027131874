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
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kernel_pytorch.errors import KptError

if TYPE_CHECKING:
    from kernel_pytorch.guard.types import Comparison

__all__ = ["Kpt"]

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
            KptError: A name that is none of them, or a value that cannot be; `where` says whose it was.
        """
        known = {f.name for f in fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise KptError(f"{where} does not know {', '.join(unknown)}; it takes {', '.join(sorted(known))}")
        changed = replace(self, **changes)
        for name in ("max_slowdown", "max_seconds", "max_pairs"):
            value = getattr(changed, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < float("inf"):
                raise KptError(f"{where}: {name} must be a number above 0, got {value!r}")
        if changed.inconclusive not in _POLICIES:
            raise KptError(f"{where}: inconclusive must be one of {', '.join(_POLICIES)}")
        return changed


class Kpt:
    """What the `kpt` fixture gives: each method compares, records what came of it, and fails the test if slower."""

    def __init__(self, node: pytest.Item, limits: Limits) -> None:
        self._node = node
        self._limits = limits
        self.comparisons: list[Comparison] = []
        """What was compared so far in this test."""
        self.told: list[str] = []
        """What went wrong beside it: a history that is away, say."""

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

    def against(
        self,
        base: str = "",
        *,
        target: str = "",
        command: str = "",
        mode: str = "inference",
        **changes: Any,
    ) -> Comparison:
        """Fail the test if the checkout, as it is now, is slower than another revision of it.

        Both run in processes of their own and take turns; the other revision has a worktree, which is removed again.

        Args:
            base: The git revision; by default what `--kpt-base` or the ini option `kpt_base` names. Where none does,
                the test is skipped: the same suite runs at a desk, and against `origin/main` in a pull request.
            target: What to run, as `kpt` takes it; a path is relative to pytest's root directory.
            command: Instead: a command that prints times in milliseconds, one number a line.
            mode: `inference`, or `training`: whole steps are timed then.
            **changes: What the marker takes, for this comparison alone.
        """
        from kernel_pytorch.guard.compare import compare_sides
        from kernel_pytorch.guard.revisions import revision_sides

        limits, config = self._limits_with(changes), self._node.config
        base = base or config.getoption("kpt_base") or config.getini("kpt_base")
        if not base:
            pytest.skip("kpt: nothing to compare with: pytest --kpt-base REV (or the ini option kpt_base)")
        sides = revision_sides(
            base,
            "HEAD",
            target=target or None,
            command=tuple(shlex.split(command)) or None,
            mode=mode,
            repository=config.rootpath,
            allow_dirty=True,
        )
        with _refusals(), sides as (old, new):
            comparison = compare_sides(
                old,
                new,
                max_slowdown=limits.max_slowdown,
                max_seconds=limits.max_seconds,
                max_pairs=int(limits.max_pairs),
                name=self._name(limits),
                command=self._command("--kpt-base", base),
            )
        return self._judge(_explained(comparison, config.rootpath), limits)

    def check(self, plan: str | Path, target: str = "", *, trust_artifacts: bool = False, **changes: Any) -> Comparison:
        """Fail the test if a plan no longer holds here: its numerics, or its speed over the unmodified model.

        STALE (made with other software, or on another device) fails too, with the command that refreshes it.

        Args:
            plan: A plan, or the directory of its search.
            target: What it is for; by default what the plan's own command names. A path is relative to pytest's root
                directory, as is the plan's.
            trust_artifacts: Whether code in the plan's `artifacts/` may be loaded.
            **changes: What the marker takes, for this comparison alone.
        """
        from kernel_pytorch.cli.guard import recorded_target
        from kernel_pytorch.core.targets import load_target
        from kernel_pytorch.guard.check import check_plan
        from kernel_pytorch.plan.store import load_plan

        limits, root = self._limits_with(changes), self._node.config.rootpath
        path = root / plan
        with _refusals():
            loaded = load_plan(path)
            directory = path if path.is_dir() else path.parent
            named = target or recorded_target(loaded, directory.resolve())
            comparison = check_plan(
                loaded,
                path,
                load_target(_below(root, named)),
                trust_artifacts=trust_artifacts,
                max_slowdown=limits.max_slowdown,
                max_seconds=limits.max_seconds,
                max_pairs=int(limits.max_pairs),
                again=shlex.join(["kpt", "check", str(plan), named, "--refresh"]),
                name=self._name(limits),
                command=self._command(),
            )
        return self._judge(comparison, limits)

    def _limits_with(self, changes: Mapping[str, Any]) -> Limits:
        return self._limits.but("kpt", changes)

    def _name(self, limits: Limits) -> str:
        """Return the test's node id, or the name it was given, and a number from the second comparison on."""
        name = limits.name or self._node.nodeid
        taken = sum(c.name == name or c.name.startswith(f"{name} (") for c in self.comparisons)
        return f"{name} ({taken + 1})" if taken else name

    def _command(self, *options: str) -> str:
        return shlex.join(["pytest", self._node.nodeid, *options])

    def _judge(self, comparison: Comparison, limits: Limits) -> Comparison:
        from kernel_pytorch.core.types import Verdict
        from kernel_pytorch.report.comparison import as_text

        if beside := _other_workers(self._node.config):
            comparison = replace(comparison, notes=(*comparison.notes, beside))
        self.comparisons.append(comparison)
        if told := _record(self._node.config, comparison):
            self.told.append(told)
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
        try:
            (config.invocation_params.dir / path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise pytest.UsageError(f"--kpt-report {path}: no such directory can be made: {error.strerror}") from error
    if not hasattr(config, "workerinput"):  # an xdist worker: its controller reports
        config.pluginmanager.register(_Reporter(config), "kpt-reporter")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the fixture, so that `-m kpt` and `-m 'not kpt'` choose by it; a marker alone guards nothing."""
    for item in items:
        uses = "kpt" in getattr(item, "fixturenames", ())
        if uses and item.get_closest_marker("kpt") is None:
            item.add_marker(pytest.mark.kpt)
        if not uses and any(marker.name == "kpt" for marker in item.own_markers):
            raise pytest.UsageError(
                f"{item.nodeid}: @pytest.mark.kpt limits the comparisons of the fixture `kpt`, "
                "which the test does not ask for: def test_it(kpt): kpt.compare(base, head)"
            )


@pytest.fixture
def kpt(request: pytest.FixtureRequest) -> Kpt:
    """Compare times: `kpt.compare(base, head)`, `kpt.against(revision, target)`, `kpt.check(plan, target)`."""
    node = request.node
    with _refusals():
        limits = _limits(node)
        if where := _history(node.config):
            from kernel_pytorch.guard.history import open_history

            open_history(None if where == "default" else where)  # a place that cannot be one is refused here
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

        report.kpt = {"comparisons": [as_json(c) for c in made.comparisons], "told": made.told}  # type: ignore[attr-defined]
    return report


class _Reporter:
    """Keeps what was compared, prints a line for each at the end, and writes the reports."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._comparisons: list[Comparison] = []
        self._told: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if seen := getattr(report, "kpt", None):
            from kernel_pytorch.guard.saved import as_comparison

            self._comparisons += map(as_comparison, seen["comparisons"])
            self._told += seen["told"]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self._comparisons:
            return
        from kernel_pytorch.report.compared import change, one_line, summary

        terminalreporter.section(f"kpt: {summary(self._comparisons)}")
        for c in self._comparisons:
            terminalreporter.write_line(f"{c.verdict!s:<12} {one_line(c.name)}  {change(c.change)}")
            if c.verdict != "PASS":
                terminalreporter.write_line(f"{'':<12} {one_line(c.reason)}")
        for line in dict.fromkeys(self._told):
            terminalreporter.write_line(f"history: {one_line(line)}")

    def pytest_sessionfinish(self) -> None:
        if self._config.getoption("collectonly"):
            return
        for path in self._config.getoption("kpt_report"):
            file = self._config.invocation_params.dir / path
            file.write_text(_WRITERS[file.suffix](self._comparisons), encoding="utf-8")


def _limits(node: pytest.Item) -> Limits:
    """Return what the markers say, the nearest first, over what the command line and the ini file say."""
    policy = node.config.getoption("kpt_inconclusive") or node.config.getini("kpt_inconclusive")
    limits = Limits().but("ini option kpt_inconclusive", {"inconclusive": policy} if policy else {})
    for marker in reversed(list(node.iter_markers("kpt"))):
        if marker.args:
            raise KptError(f"@pytest.mark.kpt takes names only, got {marker.args[0]!r}: kpt(max_slowdown=0.03)")
        limits = limits.but("@pytest.mark.kpt", marker.kwargs)
    return limits


def _record(config: pytest.Config, comparison: Comparison) -> str:
    """Record a comparison into the history, where one is configured; return what went wrong, which fails no test."""
    if not (where := _history(config)):
        return ""
    from kernel_pytorch.guard.history import open_history

    store = open_history(None if where == "default" else where)
    return store.record(comparison).message if store is not None else ""


def _history(config: pytest.Config) -> str:
    where = str(config.getoption("kpt_history") or config.getini("kpt_history"))
    return "" if where == "none" else where


@contextmanager
def _refusals() -> Iterator[None]:
    """Fail with the message of what was refused, and how to mend it, instead of with a traceback."""
    try:
        yield
    except KptError as error:
        fix = f"\nfix: {error.fix}" if error.fix else ""
        trace = f"\n{error.user_traceback}" if error.user_traceback else ""
        raise pytest.fail.Exception(f"kpt: {error}{fix}{trace}", pytrace=False) from None


def _explained(comparison: Comparison, repository: Path) -> Comparison:
    """Return a slowdown with what probably caused it."""
    from kernel_pytorch.core.types import Verdict
    from kernel_pytorch.guard.culprit import find_culprits

    if comparison.verdict is not Verdict.FAIL:
        return comparison
    return replace(comparison, culprits=find_culprits(comparison, repo=repository))


def _below(root: Path, target: str) -> str:
    """Return a target whose file is named from the root directory."""
    file, colon, factory = target.rpartition(":")
    return f"{root / file}{colon}{factory}" if file.endswith(".py") else target


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
