"""The pytest plugin, in test runs of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from _pytest.pytester import SysModulesSnapshot

from kernel_pytorch import pytest_plugin
from kernel_pytorch.guard.history import History
from kernel_pytorch.guard.saved import read_comparisons
from tests import forks

MAKE_PLAN = Path(__file__).parents[1] / "cli" / "make_plan.py"

pytest_plugins = ["pytester"]

LOADED = any(point.value == "kernel_pytorch.pytest_plugin" for point in entry_points(group="pytest11"))
PLUGIN = () if LOADED else ("-p", "kernel_pytorch.pytest_plugin")

HEAD = """
import time
import pytest

def takes(ms):
    return lambda: time.sleep(ms / 1e3)
"""


def forget_tests(snapshot: SysModulesSnapshot) -> None:
    """Forget the test modules that a run imported, and only those: numpy and torch load but once a process."""
    for name in set(sys.modules) - set(snapshot._SysModulesSnapshot__saved):
        if name.startswith(("test_", "conftest")):
            del sys.modules[name]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """Run a test file, and return its outcomes and output."""
    monkeypatch.setattr(SysModulesSnapshot, "restore", forget_tests)

    def run(source: str, *options: str, ini: str = "") -> pytest.RunResult:
        pytester.makeini(f"[pytest]\nfilterwarnings = error\n{ini}")
        pytester.makepyfile(test_speed=HEAD + source)
        plain = ("-p", "no:randomly", "-p", "no:cacheprovider", "--strict-markers", "--strict-config")
        if "-n2" in options:  # its workers are processes, which load plugins by name
            return pytester.runpytest_subprocess(*PLUGIN, *plain, *options)
        return pytester.runpytest_inprocess(*plain, *options, plugins=[] if LOADED else [pytest_plugin])

    return run


def test_a_slower_head_fails_with_a_table_and_a_faster_one_passes(run, pytester: pytest.Pytester) -> None:
    done = run(
        """
@pytest.mark.kpt(max_slowdown=0.2)
def test_slower(kpt):
    kpt.compare(base=takes(2), head=takes(5))

def test_faster(kpt):
    seen = kpt.compare(base=takes(5), head=takes(2))
    assert seen.change.high < 1
    assert kpt.comparisons == [seen]
""",
        "--kpt-report=out/kpt.md",
        "--kpt-report=out/kpt.json",
        "--kpt-report=out/kpt.xml",
        "--kpt-report=out/kpt.prom",
        "--junitxml=junit.xml",
    )
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(
        [
            "kpt: FAIL  test_speed.py::test_slower: *% slower, 20 % allowed",
            "median time *ms *ms",
            "samples (side by side)*",
            "change, * % *[[]*, *",
            "again: pytest test_speed.py::test_slower",
            "*kpt: 1 FAIL, 1 PASS*",
            "FAIL * test_speed.py::test_slower *[[]*",
            "PASS * test_speed.py::test_faster *",
        ]
    )
    assert "compare_calls" not in done.stdout.str(), "no traceback through the plugin"
    assert (pytester.path / "out" / "kpt.md").read_text().startswith("### Performance: 1 FAIL, 1 PASS\n")
    slower, faster = read_comparisons(pytester.path / "out" / "kpt.json")
    assert (slower.name, str(slower.verdict)) == ("test_speed.py::test_slower", "FAIL")
    assert slower.max_slowdown == 0.2
    assert faster.max_slowdown == 0.03
    assert len(slower.base_samples_ms) == len(slower.head_samples_ms) >= 10
    assert ET.parse(pytester.path / "out" / "kpt.xml").getroot()[0].get("failures") == "1"
    assert 'verdict="FAIL"} 1.0' in (pytester.path / "out" / "kpt.prom").read_text()
    cases = ET.parse(pytester.path / "junit.xml").getroot().iter("testcase")
    properties = {c.get("name"): {p.get("name"): p.get("value") for p in c.iter("property")} for c in cases}
    assert properties["test_slower"]["kpt.verdict"] == "FAIL"
    assert float(properties["test_slower"]["kpt.change_low"]) > 1
    assert properties["test_faster"]["kpt.id"] == faster.id


def test_an_exception_of_the_test_is_the_tests(run) -> None:
    done = run(
        """
def test_raises(kpt):
    kpt.compare(base=takes(1), head=lambda: 1 / 0)
"""
    )
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*ZeroDivisionError*"])


NEVER = """
@pytest.mark.kpt(max_slowdown=1e-6, max_seconds=0.01, max_pairs=2{more})
def test_undecided(kpt):
    kpt.compare(base=takes(1), head=takes(1))
"""


@pytest.mark.parametrize(
    ("more", "options", "ini", "outcome"),
    [
        ("", (), "", "passed"),
        ("", (), "kpt_inconclusive = fail", "failed"),
        ("", ("--kpt-inconclusive=skip",), "kpt_inconclusive = fail", "skipped"),
        (", inconclusive='fail'", ("--kpt-inconclusive=skip",), "", "failed"),
        (", inconclusive='pass'", (), "kpt_inconclusive = fail", "passed"),
    ],
)
def test_undecided_counts_as_it_is_told(run, more: str, options: tuple[str, ...], ini: str, outcome: str) -> None:
    done = run(NEVER.format(more=more), *options, ini=ini)
    done.assert_outcomes(**{outcome: 1})
    done.stdout.fnmatch_lines(["INCONCLUSIVE test_speed.py::test_undecided *", "* too few for a verdict*"])


@pytest.mark.parametrize(
    ("marker", "reason"),
    [
        ("max_slow=0.1", "*@pytest.mark.kpt does not know max_slow; it takes inconclusive, max_pairs, *"),
        ("0.1", "*@pytest.mark.kpt takes names only, got 0.1*"),
        ("max_slowdown=-1", "*max_slowdown must be a number above 0, got -1*"),
        ("max_slowdown='3%'", "*max_slowdown must be a number above 0, got '3%'*"),
        ("inconclusive='maybe'", "*inconclusive must be one of pass, fail, skip*"),
    ],
)
def test_a_wrong_marker_is_an_error_that_says_why(run, marker: str, reason: str) -> None:
    done = run(f"@pytest.mark.kpt({marker})\ndef test_it(kpt):\n    pass\n")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines([reason])


def test_the_nearest_marker_counts_and_the_call_before_it(run, pytester: pytest.Pytester) -> None:
    done = run(
        """
pytestmark = pytest.mark.kpt(max_slowdown=5, max_pairs=16, name="module's")

@pytest.mark.kpt(max_slowdown=7)
def test_it(kpt):
    kpt.compare(base=takes(1), head=takes(1))
    kpt.compare(base=takes(1), head=takes(1), max_slowdown=9)
    kpt.compare(base=takes(1), head=takes(1), name="own")
""",
        "--kpt-report=kpt.json",
    )
    done.assert_outcomes(passed=1)
    seen = read_comparisons(pytester.path / "kpt.json")
    assert [(c.name, c.max_slowdown) for c in seen] == [("module's", 7), ("module's (2)", 9), ("own", 7)]


def test_classes_and_fixtures_that_use_the_fixture_work_as_any(run) -> None:
    done = run(
        """
import unittest

class Old(unittest.TestCase):
    def test_old(self):
        pass

@pytest.fixture
def speed(kpt):
    return kpt

def test_through_a_fixture(speed):
    assert speed.comparisons == []

@pytest.mark.kpt(max_slowdown=0.1)
class TestNew:
    def test_compared(self, kpt):
        assert kpt.comparisons == []

    def test_not_compared(self):
        pass
"""
    )
    done.assert_outcomes(passed=4)


def test_what_uses_the_fixture_is_chosen_by_the_marker(run) -> None:
    source = "def test_a(kpt):\n    pass\n\ndef test_b():\n    pass\n"
    run(source, "-m", "kpt").assert_outcomes(passed=1, deselected=1)
    run(source, "-m", "not kpt").assert_outcomes(passed=1, deselected=1)


def test_a_marker_that_guards_nothing_is_refused(run) -> None:
    done = run("@pytest.mark.kpt(max_slowdown=0.1)\ndef test_it():\n    pass\n")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*test_speed.py::test_it: @pytest.mark.kpt limits the comparisons of the fixture*"])


ANY = """
@pytest.mark.kpt(max_slowdown=5, max_pairs=16, name="any")
def test_it(kpt):
    kpt.compare(base=takes(1), head=takes(1))
"""


def test_comparisons_are_recorded_where_the_ini_file_says(run, pytester: pytest.Pytester) -> None:
    pytest.importorskip("sqlalchemy", reason="pip install 'kernel-pytorch[history]'")
    database = pytester.path / "runs.db"
    ini = f"kpt_history = {database}"
    run(ANY, ini=ini).assert_outcomes(passed=1)
    run(ANY, "--kpt-history=none", ini=ini).assert_outcomes(passed=1)
    (recorded,) = History(str(database)).runs()
    assert recorded.name == "any"
    assert len(recorded.head_samples_ms) == 16


def test_a_history_that_is_away_is_told_and_fails_no_test(
    run, monkeypatch: pytest.MonkeyPatch, pytester: pytest.Pytester
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(pytester.path / "state"))
    done = run(ANY, ini="kpt_history = postgresql://kpt:secret@127.0.0.1:9/kpt")
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines(["PASS *any *", "history: *"])
    assert "secret" not in done.stdout.str()


def test_a_history_that_cannot_be_one_is_an_error(run) -> None:
    done = run(ANY, ini="kpt_history = gopher://nowhere")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["kpt: a history cannot be kept at gopher://...", "fix: use a file name, *"])


def test_against_nothing_is_skipped_and_says_what_to_give(run) -> None:
    done = run("def test_it(kpt):\n    kpt.against(target='model.py:workload')\n", "-rs")
    done.assert_outcomes(skipped=1)
    done.stdout.fnmatch_lines(["*nothing to compare with: pytest --kpt-base REV*"])


def test_against_a_revision_that_is_unknown_fails_in_one_line(run, pytester: pytest.Pytester) -> None:
    subprocess.run(["git", "init", "-q", str(pytester.path)], check=True)
    done = run("def test_it(kpt):\n    kpt.against('main', target='model.py:workload')\n")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["kpt: unknown revision 'main' in *"])


NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), torch.randn(4, 8)
"""


@pytest.mark.slow
def test_a_plan_is_checked_and_one_of_other_software_is_stale(run, pytester: pytest.Pytester) -> None:
    (pytester.path / "nets.py").write_text(NET)
    for name, kind, *changes in (
        ("good", "none"),
        ("stale", "bf16", 'device.software.torch="1.0"'),
        ("elsewhere", "bf16", 'workload.fingerprint="0"'),
    ):
        forks.python(MAKE_PLAN, name, kind, *changes, cwd=pytester.path).check_returncode()
    done = run(
        """
@pytest.mark.kpt(max_slowdown=1, max_pairs=16, max_seconds=2)
@pytest.mark.parametrize("plan", ["good", "stale", "elsewhere"])
def test_plan(kpt, plan):
    kpt.check(plan, "nets.py:net")
"""
    )
    done.assert_outcomes(passed=1, failed=2)
    done.stdout.fnmatch_lines(
        [
            "kpt: STALE *test_plan[[]stale]*",
            "*kpt check stale *nets.py:net --refresh*",
            "kpt: *another model*",
            "PASS * *test_plan[[]good] *",
        ]
    )


def test_a_plan_that_is_not_there_fails_in_one_line(run) -> None:
    done = run("def test_it(kpt):\n    kpt.check('nowhere', 'model.py:workload')\n")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["kpt: *nowhere*"])


NOT_TIMED = """
import sys, types
from kernel_pytorch.core.types import Ratio, Verdict
from kernel_pytorch.guard.types import Comparison, SideFacts

def compare_calls(base, head, *, name, max_slowdown, **_):
    sides = SideFacts("base"), SideFacts("head")
    made = "2026-01-01T00:00:00+00:00"
    return Comparison("compare", name, Verdict.PASS, "not timed", max_slowdown, *sides, made, name,
                      change=Ratio(1.0, 0.99, float("inf")), base_samples_ms=(1.0,), head_samples_ms=(1.0,))

sys.modules["kernel_pytorch.guard.calls"] = types.SimpleNamespace(compare_calls=compare_calls)
"""


def test_comparisons_reach_the_report_from_workers_of_xdist(run, pytester: pytest.Pytester) -> None:
    pytest.importorskip("xdist", reason="pip install 'kernel-pytorch[dev]'")
    pytester.makeconftest(NOT_TIMED)
    done = run(
        """
@pytest.mark.parametrize("i", range(2))
def test_it(kpt, i):
    kpt.compare(base=takes(1), head=takes(1))
""",
        "-n2",
        "--kpt-report=kpt.json",
    )
    done.assert_outcomes(passed=2)
    done.stdout.fnmatch_lines(["*kpt: 2 PASS*"])
    seen = read_comparisons(pytester.path / "kpt.json")
    assert sorted(c.name for c in seen) == ["test_speed.py::test_it[0]", "test_speed.py::test_it[1]"]
    assert all(c.notes == ("taken beside 1 other workers of pytest-xdist, which is noise",) for c in seen)
    assert all(c.change.high == float("inf") for c in seen)


def test_a_report_of_an_unknown_kind_is_refused_at_the_start(run) -> None:
    done = run("def test_a():\n    pass\n", "--kpt-report=kpt.pdf")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*kpt.pdf: the name must end with one of .md, .json, .xml, .prom*"])
    done = run("def test_a():\n    pass\n", "--kpt-report=tox.ini/kpt.md")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*tox.ini/kpt.md: no such directory can be made: *"])


def test_a_run_without_comparisons_says_nothing(run) -> None:
    done = run("def test_a():\n    pass\n")
    assert "kpt:" not in done.stdout.str()


def test_loading_the_plugin_imports_nothing_heavy() -> None:
    code = (
        "import sys, pytest; before = set(sys.modules); import kernel_pytorch.pytest_plugin; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"kernel_pytorch"}


def test_a_test_run_without_comparisons_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy = "torch numpy scipy pydantic rich sqlalchemy"
    (tmp_path / "test_light.py").write_text(
        "import sys\n\ndef test_a():\n    pass\n\ndef test_b():\n"
        f"    assert not [m for m in {heavy.split()!r} if m in sys.modules]\n"
        "    assert 'kernel_pytorch.pytest_plugin' in sys.modules\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PLUGIN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout


def test_reports_are_json_that_says_its_version(run, pytester: pytest.Pytester) -> None:
    run("def test_a():\n    pass\n", "--kpt-report=kpt.json").assert_outcomes(passed=1)
    assert json.loads((pytester.path / "kpt.json").read_text()) == {"schema_version": 1, "comparisons": []}


def test_the_docstring_shows_what_works() -> None:
    assert "kpt.compare(base=" in pytest_plugin.__doc__
