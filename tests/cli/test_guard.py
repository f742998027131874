"""`kpt check`, `kpt compare` and `kpt history` as users run them: verdicts, forms, exit codes, and bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from tests import forks

from kernel_pytorch.cli import main
from kernel_pytorch.plan.store import SearchDirectory

SIDES = "--base REV [--head REV], --base-python P [--head-python P], two targets, --command twice, or --base-samples F "
WAYS = f"give {SIDES}--head-samples F"


@pytest.fixture(autouse=True)
def own_history(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KPT_HISTORY", str(files / "history.sqlite"))
    monkeypatch.setenv("XDG_STATE_HOME", str(files / "state"))


@pytest.fixture
def series(files: Path) -> Path:
    """Return a directory with series of times: as fast, slower, noisy, short and wrong ones."""
    flat = [10.0 + 0.01 * (i % 7) for i in range(80)]
    (files / "flat.json").write_text(json.dumps(flat))
    (files / "same.json").write_text(json.dumps([10.0 + 0.01 * ((i * 3) % 7) for i in range(80)]))
    (files / "slow.json").write_text(json.dumps([1.1 * t for t in flat]))
    (files / "drifts.json").write_text(json.dumps([t * (1 + 0.002 * i) for i, t in enumerate(flat)]))
    (files / "short.json").write_text("[10.0, 10.1, 10.2]")
    (files / "text.json").write_text('["10 ms"]')
    (files / "torn.json").write_text("[10.0, 10.1")
    (files / "object.json").write_text('{"a": 1}')
    return files


@pytest.fixture
def here(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., SimpleNamespace]:
    """Return a function that runs `kpt` in this process: for what neither times nor loads anything."""
    monkeypatch.chdir(files)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["kpt", *arguments])
        capsys.readouterr()
        code = main(arguments)
        said = capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err)

    return run


def refused(done, line: str) -> None:
    """Assert that a command was refused with this line, and nothing else but what the user's code says."""
    assert done.code == 2, done
    assert done.out == ""
    lines = [said for said in done.err.splitlines() if said != "the user's own print"]
    assert lines == [f"kpt: error: {line}"]


CHECK_HELP = "see: kpt check --help"
COMPARE_HELP = "see: kpt compare --help"
MISUSE = {
    "no plan": (["check"], f"Missing argument 'PLAN'; {CHECK_HELP}"),
    "slowdown zero": (
        ["check", "p", "--max-slowdown", "0"],
        f"Invalid value for '--max-slowdown': 0 must be above 0 and below 10; {CHECK_HELP}",
    ),
    "slowdown text": (
        ["compare", "x", "--max-slowdown", "3%"],
        f"Invalid value for '--max-slowdown': '3%' is not a number; {COMPARE_HELP}",
    ),
    "keep": (["check", "p", "--keep", "90"], f"Invalid value for '--keep': 90 must be from 0 to 1; {CHECK_HELP}"),
    "keep nan": (
        ["check", "p", "--keep", "nan"],
        f"Invalid value for '--keep': nan must be from 0 to 1; {CHECK_HELP}",
    ),
    "form": (
        ["check", "p", "--format", "html"],
        "Invalid value for '--format': 'html' is not one of 'text', 'json', 'markdown', 'junit', 'prometheus'; "
        + CHECK_HELP,
    ),
    "inconclusive": (
        ["check", "p", "--inconclusive", "maybe"],
        f"Invalid value for '--inconclusive': 'maybe' is not one of 'pass', 'fail'; {CHECK_HELP}",
    ),
    "three targets": (
        ["compare", "a:a", "b:b", "c:c"],
        f"3 targets; at most two can be compared; {COMPARE_HELP}",
    ),
    "nothing to run": (
        ["compare", "--base", "HEAD~1"],
        f"nothing says what to run; fix: give a TARGET or --command; {WAYS}",
    ),
    "nothing differs": (["compare", "nets.py:net"], f"both sides are the same: nothing differs; fix: {WAYS}"),
    "one command": (["compare", "--command", "x"], f"both sides are the same: nothing differs; fix: {WAYS}"),
    "three commands": (
        ["compare", "--command", "x", "--command", "y", "--command", "z"],
        f"3 commands; at most two can be compared; fix: {WAYS}",
    ),
    "target and command": (
        ["compare", "nets.py:net", "--command", "x", "--base", "HEAD~1"],
        "a TARGET and a --command exclude each other; fix: give one of the two",
    ),
    "two targets and revisions": (
        ["compare", "a.py:a", "b.py:b", "--base", "HEAD~1"],
        (
            "two targets and two revisions: one difference at a time tells something; "
            "fix: name one TARGET (or --command) for both revisions"
        ),
    ),
    "head alone": (
        ["compare", "nets.py:net", "--head", "HEAD"],
        "--head REV needs --base REV to compare with; fix: --base REV",
    ),
    "one series": (
        ["compare", "--base-samples", "a.json"],
        "series come in two; fix: give both --base-samples FILE and --head-samples FILE",
    ),
    "series and target": (
        ["compare", "nets.py:net", "--base-samples", "a.json", "--head-samples", "b.json"],
        "series were taken elsewhere, so nothing else can be run beside them; fix: give the two files only",
    ),
    "paired without series": (
        ["compare", "a.py:a", "b.py:b", "--paired"],
        "--paired is about series; fix: give --base-samples and --head-samples, or leave it out",
    ),
    "bisect without revisions": (
        ["compare", "a.py:a", "b.py:b", "--bisect"],
        "--bisect walks git revisions; fix: give --base REV --head REV",
    ),
    "bisect series": (
        ["compare", "--base-samples", "a.json", "--head-samples", "b.json", "--bisect"],
        "--bisect runs revisions, and series are files; fix: give --base REV --head REV",
    ),
    "per line without command": (
        ["compare", "a.py:a", "b.py:b", "--per-line"],
        "--per-line is about what a --command prints; fix: leave it out",
    ),
    "dirty without revisions": (
        ["compare", "a.py:a", "b.py:b", "--allow-dirty"],
        "--allow-dirty is about revisions; fix: give --base REV",
    ),
    "first parent without bisect": (
        ["compare", "a.py:a", "--base", "HEAD~1", "--first-parent"],
        "--first-parent is about --bisect; fix: leave it out",
    ),
    "missing plan": (["check", "nowhere"], "no plan at nowhere; fix: kpt optimize TARGET -o DIR"),
    "no directory for the outcome": (
        ["check", "p", "-o", "no/such/file.xml"],
        "cannot write no/such/file.xml: there is no such directory; fix: create it first",
    ),
    "history command": (["history", "prnue"], "no command 'prnue'; did you mean prune?; see: kpt history --help"),
    "switched off": (
        ["history", "list", "--history", "none"],
        "no history is kept: it is switched off; fix: --history URL, or unset KPT_HISTORY",
    ),
    "prune": (["history", "prune"], "nothing says which runs to keep; fix: give --keep-days, --keep-runs or both"),
    "limit": (
        ["history", "list", "--limit", "0"],
        "Invalid value for '--limit': 0 is not in the range x>=1; see: kpt history list --help",
    ),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_one_line_with_what_to_do(here, case):
    arguments, line = MISUSE[case]
    refused(here(*arguments), line)


SERIES = {
    "short": (
        "short.json",
        "short.json has 3 samples, too few to judge; fix: take at least 10, better 40 a side",
    ),
    "text": (
        "text.json",
        (
            "sample 0 of text.json is '10 ms', expected a positive number; "
            "fix: give a JSON array of milliseconds in time order, such as [12.1, 12.3, 12.2]"
        ),
    ),
    "object": (
        "object.json",
        (
            "object.json holds an object, expected an array; "
            "fix: it should hold a JSON array of milliseconds in time order, such as [12.1, 12.3, 12.2]"
        ),
    ),
    "nowhere": ("nowhere.json", "no file nowhere.json"),
}


@pytest.mark.parametrize("case", SERIES)
def test_files_that_are_no_series(here, series, case):
    name, line = SERIES[case]
    refused(here("compare", "--base-samples", "flat.json", "--head-samples", name), line)


def test_pairs_of_different_lengths_are_none(here, series):
    (series / "less.json").write_text(json.dumps([10.0] * 60))
    done = here("compare", "--base-samples", "flat.json", "--head-samples", "less.json", "--paired")
    refused(
        done,
        "flat.json has 80 samples and less.json 60: these are no pairs; fix: give series whose sample i was taken "
        "beside sample i of the other, or leave --paired out",
    )


def judged(here, base: str, head: str, *more: str):
    done = here("compare", "--base-samples", base, "--head-samples", head, "--format", "json", *more)
    return done, json.loads(done.out)


def test_paired_series_pass_fail_and_improve(here, series):
    for base, head, code, verdict in (
        ("flat.json", "same.json", 0, "PASS"),
        ("flat.json", "slow.json", 1, "FAIL"),
        ("slow.json", "flat.json", 0, "PASS"),
    ):
        done, told = judged(here, base, head, "--paired")
        assert (done.code, told["verdict"]) == (code, verdict), (base, head, told["reason"])
        assert told["command"].startswith("kpt compare --base-samples")


def test_series_apart_are_undecided_where_they_drift_and_the_message_says_how_to_take_them(here, series):
    done, told = judged(here, "flat.json", "drifts.json")
    assert told["verdict"] == "INCONCLUSIVE"
    assert "side by side" in told["reason"]
    assert done.code == 0
    assert "kpt: not decided (--inconclusive pass): drifts: " in done.err
    done, _ = judged(here, "flat.json", "drifts.json", "--inconclusive", "fail")
    assert done.code == 1


def test_results_of_pytest_benchmark_are_judged_by_name(here, series):
    for name, factor in (("old", 1.0), ("new", 1.5)):
        stats = {"data": [0.01 * factor * (1 + 0.001 * (i % 5)) for i in range(60)], "median": 0.01 * factor}
        benchmarks = [{"name": "test_step", "fullname": "t.py::test_step", "stats": stats}]
        raw = {"machine_info": {}, "commit_info": {}, "benchmarks": benchmarks, "datetime": "2026-01-01T00:00:00+00:00"}
        (series / f"{name}.json").write_text(json.dumps(raw))
    done = here("compare", "--base-samples", "old.json", "--head-samples", "new.json")
    assert done.code == 1, done
    assert done.out.startswith("FAIL  t.py::test_step: 50.0 % slower")
    refused(
        here("compare", "--base-samples", "old.json", "--head-samples", "new.json", "--paired"),
        "--paired is about plain series; these are results of a benchmark tool, each with its own name; "
        "fix: leave it out",
    )


def test_every_form_goes_to_a_file_beside_text_and_to_stdout_alone(here, series):
    asked = ("compare", "--base-samples", "flat.json", "--head-samples", "slow.json", "--paired")
    for form, mark in (("markdown", "| ❌ FAIL |"), ("junit", "<testsuites>"), ("prometheus", "kpt_verdict{")):
        alone = here(*asked, "--format", form)
        beside = here(*asked, "--format", form, "-o", f"out.{form}")
        assert (alone.code, beside.code) == (1, 1)
        assert mark in alone.out
        assert mark in (series / f"out.{form}").read_text()
        assert beside.out.startswith("FAIL  slow: 10.0 % slower, 3.0 % allowed")
    ET.fromstring((series / "out.junit").read_text())


def test_runs_are_recorded_listed_shown_exported_and_pruned(here, series):
    for head in ("same.json", "slow.json"):
        here("compare", "--base-samples", "flat.json", "--head-samples", head, "--paired", "--name", "step")
    here("compare", "--base-samples", "flat.json", "--head-samples", "same.json", "--paired", "--history", "none")
    told = json.loads(here("history", "list", "--format", "json").out)
    assert [(run["name"], run["verdict"]) for run in told["runs"]] == [("step", "PASS"), ("step", "FAIL")]
    assert told["history"] == f"sqlite:///{series / 'history.sqlite'}"
    listed = here("history", "list")
    assert listed.code == 0
    assert told["runs"][1]["id"][:10] in listed.out
    shown = here("history", "show", told["runs"][1]["id"][:12])
    assert shown.out.startswith("FAIL  step: 10.0 % slower")
    assert shown.code == 0
    assert json.loads(here("history", "show", told["runs"][0]["id"], "--format", "json").out)["verdict"] == "PASS"
    plotted = here("history", "plot", "--name", "step", "-o", "trends.html")
    assert (plotted.code, plotted.out) == (0, "trends.html\n")
    assert "step" in (series / "trends.html").read_text()
    refused(
        here("history", "plot", "-o", "no/trends.html"),
        "cannot write no/trends.html: there is no such directory; fix: create it first",
    )
    exported = here("history", "export", "--format", "csv", "-o", "runs.csv")
    assert exported.out == ""
    assert len((series / "runs.csv").read_text().splitlines()) == 3
    assert len(json.loads(here("history", "export").out)) == 2
    assert here("history", "prune", "--keep-runs", "1").out.startswith("deleted 1 runs of ")
    refused(
        here("history", "show", told["runs"][0]["id"]),
        f"no run '{told['runs'][0]['id']}' in sqlite:///{series / 'history.sqlite'}; fix: kpt history list",
    )


def test_a_history_that_is_away_costs_no_verdict(here, series):
    asked = ("compare", "--base-samples", "flat.json", "--head-samples", "slow.json", "--paired", "--history")
    done = here(*asked, "postgresql://nobody@127.0.0.1:1/none")
    assert done.code == 1, done.err
    assert done.out.startswith("FAIL")
    assert "kpt: history: this run is kept in " in done.err
    refused(
        here(*asked, "mysql://x"),
        "a history cannot be kept at mysql://...; fix: use a file name, sqlite:///PATH, "
        "postgresql://USER@HOST/DATABASE, or none",
    )


# What two commands print is not timed here, so these verdicts are certain.


def prints(files: Path, name: str, ms: float) -> str:
    """Write a command that prints a time that varies a little with each call."""
    counter, script = files / f"{name}.count", files / f"{name}.py"
    script.write_text(
        "from pathlib import Path\n"
        f"counter = Path({str(counter)!r})\n"
        "n = int(counter.read_text()) + 1 if counter.exists() else 0\n"
        "counter.write_text(str(n))\n"
        f"print({ms} * (1 + 0.001 * (n * 7 % 5)))\n"
    )
    return f"{sys.executable} -S {script}"


def test_two_commands(kpt, files):
    fast, slow = prints(files, "fast", 10.0), prints(files, "slow", 11.0)
    done = kpt("compare", "--command", fast, "--command", slow, "--format", "json")
    told = json.loads(done.out)
    assert (done.code, told["verdict"]) == (1, "FAIL"), done.err
    assert told["culprits"]
    done = kpt("compare", "--command", slow, "--command", fast, "--format", "json")
    assert (done.code, json.loads(done.out)["verdict"]) == (0, "PASS")


def test_a_command_that_crashes_is_undecided_with_its_reason(kpt, files):
    fine = prints(files, "fine", 10.0)
    crashes = f"{sys.executable} -c 'raise SystemExit(3)'"
    done = kpt("compare", "--command", fine, "--command", crashes, "--inconclusive", "fail")
    assert done.code == 1
    assert done.out.startswith("INCONCLUSIVE")
    assert "exited with code 3" in done.out


@pytest.fixture
def repository(files: Path) -> Path:
    """Return a repository of six commits; from the fourth on the time that it prints is 20 % more."""
    git = ["git", "-c", "user.name=n", "-c", "user.email=n@example.com"]
    subprocess.run([*git, "init", "-q", "-b", "main"], cwd=files, check=True)
    (files / ".gitignore").write_text("*.sqlite*\nstate\n__pycache__\n")
    for i in range(6):
        (files / "ms.txt").write_text(f"{10.0 if i < 3 else 12.0}\n")
        (files / "notes.md").write_text(f"note {i}\n")
        subprocess.run([*git, "add", "-A"], cwd=files, check=True)
        subprocess.run([*git, "commit", "-q", "-m", f"commit {i}"], cwd=files, check=True)
    return files


@pytest.mark.slow
def test_revisions_and_bisection(kpt, repository):
    done = kpt("compare", "--command", "cat ms.txt", "--base", "HEAD~5", "--bisect", "--format", "json")
    told = json.loads(done.out)
    assert (done.code, told["verdict"]) == (1, "FAIL"), done.err
    assert told["culprits"][0]["what"].startswith("the first slow commit is ")
    assert "commit 3" in told["culprits"][0]["what"]
    assert [culprit["kind"] for culprit in told["culprits"]].count("revision") == 1
    assert any(note.startswith("bisect: ") and note.endswith("commit 2: PASS") for note in told["notes"])
    names = {run["name"] for run in json.loads(kpt("history", "list", "--format", "json").out)["runs"]}
    assert names == {"cat ms.txt", "cat ms.txt (bisect)"}
    left = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True, check=True)
    assert len(left.stdout.splitlines()) == 1


def test_nothing_is_bisected_without_a_slowdown(kpt, repository):
    done = kpt("compare", "--command", "cat ms.txt", "--base", "main", "--bisect")
    assert done.code == 0, done.err
    assert "main and HEAD are the same commit: what differs is noise" in " ".join(done.out.split())
    assert "not bisected: that needs a FAIL, and the verdict is PASS" in " ".join(done.out.split())


def test_revisions_that_are_unknown_or_not_what_lies_there(kpt, repository):
    refused(
        kpt("compare", "--command", "cat ms.txt", "--base", "mian"),
        f"unknown revision 'mian' in {repository}; did you mean 'main'?; fix: git fetch --all",
    )
    (repository / "ms.txt").write_text("15\n")
    refused(
        kpt("compare", "--command", "cat ms.txt", "--base", "HEAD~1"),
        f"HEAD is checked out in {repository} with changes that no commit holds: ms.txt; "
        "fix: git commit or git stash them, or compare the checkout as it is with --allow-dirty",
    )
    done = kpt("compare", "--command", "cat ms.txt", "--base", "HEAD~1", "--allow-dirty")
    assert done.code == 1
    assert "uncommitted changes" in done.out


def test_two_targets_that_are_not_the_same_model_are_refused(kpt, files):
    done = kpt("compare", "nets.py:net", "nets.py:wide", "--budget", "2")
    assert done.code == 2
    assert done.out == ""
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("kpt: error: the sides have different models: base has ")
    assert last.endswith("; fix: name targets that build the same model with the same inputs on both sides")


def test_an_environment_without_the_package_is_refused_with_what_to_install(kpt, files):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "bare"], cwd=files, check=True)
    done = kpt("compare", "nets.py:net", "--head-python", "bare")
    assert done.code == 2
    last = done.err.strip().splitlines()[-1]
    assert last.startswith(f"kpt: error: head: {files}/bare/bin/python has no torch and no kernel_pytorch; fix: ")
    assert f"{files}/bare/bin/python -m pip install torch " in last
    refused(
        kpt("compare", "nets.py:net", "--base-python", "nowhere/python"),
        "interpreter nowhere/python does not exist; fix: give its path: ENVIRONMENT/bin/python",
    )


# Plans.


def test_a_plan_whose_target_is_not_known(kpt, files, make_plan):
    make_plan("plan", "bf16", 'command=""')
    fix = f"fix: kpt check {files}/plan TARGET"
    refused(kpt("check", "plan"), f"the plan does not say which target it was made for; {fix}")
    make_plan("plan", "bf16", 'command="kpt optimize other.py:net -o plan"')
    refused(kpt("check", "plan"), f"the plan was made for other.py:net, which is neither here nor in {files}; {fix}")


def test_a_plan_for_another_model_is_refused(kpt, files, make_plan):
    make_plan("plan", "bf16", *fresh())
    refused(
        kpt("check", "plan", "nets.py:wide"),
        "the plan is for another model than this Net: tiny (354 parameters, the plan's has 20); "
        "fix: run `kpt optimize` for it",
    )


def fresh() -> list[str]:
    import kernel_pytorch

    return [f'package_version="{kernel_pytorch.__version__}"', 'command="kpt optimize nets.py:net -o plan"']


def checked(kpt, *more: str):
    done = kpt("check", "plan", "--budget", "4", "--format", "json", *more)
    assert done.code in (0, 1), done.err
    return done, json.loads(done.out)


def test_a_plan_of_other_software_is_stale_and_says_how_to_validate_it_anew(kpt, files, make_plan):
    make_plan("plan", "none", *fresh(), 'device.software.torch="1.13.0"')
    done, told = checked(kpt)
    assert (done.code, told["verdict"]) == (1, "STALE")
    assert "torch 1.13.0 -> " in told["reason"]
    assert told["reason"].endswith(f"kpt check plan {files}/nets.py:net --refresh")
    assert told["base"]["software"]["torch"] == "1.13.0"
    assert any("torch" in culprit["what"] for culprit in told["culprits"])


def test_a_plan_of_another_device_is_stale_and_cannot_be_refreshed(kpt, files, make_plan):
    make_plan("plan", "bf16", *fresh(), 'device.arch="sm_90"', 'device.vendor="nvidia"')
    before = (files / "plan" / "plan.json").read_text()
    for more in ((), ("--refresh",)):
        done, told = checked(kpt, *more)
        assert (done.code, told["verdict"]) == (1, "STALE")
        assert (files / "plan" / "plan.json").read_text() == before
        assert "it cannot be applied here; make one: kpt optimize nets.py:net -o plan" in told["reason"]


@pytest.mark.slow
def test_refreshing_stamps_the_plan_anew_where_it_passes(kpt, files, make_plan):
    make_plan("plan", "none", *fresh(), 'device.software.torch="1.13.0"')
    (files / "plan" / "artifacts").mkdir()
    (files / "plan" / "artifacts" / "compile_cache.zip").write_text("of torch 1.13.0")
    (files / "plan" / "report.html").write_text("of torch 1.13.0")
    done, told = checked(kpt, "--refresh", "--max-slowdown", "5")
    assert (done.code, told["verdict"]) == (0, "PASS"), told["reason"]
    assert "kpt: wrote plan/plan.json anew" in done.err.splitlines()
    assert not (files / "plan" / "artifacts").exists()
    assert "of torch 1.13.0" not in (files / "plan" / "report.html").read_text()
    import torch

    plan = json.loads((files / "plan" / "plan.json").read_text())
    assert plan["device"]["software"]["torch"] == torch.__version__
    assert "torch 1.13.0 -> " in plan["chosen"]["notes"][-1]
    assert plan["chosen"]["measurement"]["samples_ms"] == told["head_samples_ms"]
    assert len(plan["evidence"]) == 5  # the search's three, what it had chosen, and the new one
    assert checked(kpt, "--max-slowdown", "5")[1]["verdict"] == "PASS"
    assert kpt("explain", "plan").code == 0


@pytest.mark.slow
def test_a_plan_that_is_slower_than_the_unmodified_model_fails(kpt, files, make_plan):
    make_plan("plan", "bf16", *fresh())  # casting costs more than a model of this size takes
    done, told = checked(kpt, "--keep", "0")
    assert (done.code, told["verdict"]) == (1, "FAIL"), told["reason"]
    assert told["reason"].startswith("the plan is slower than the unmodified model: 0.")
    assert told["kind"] == "check"
    assert told["change"]["low"] > 1
    assert any(note.endswith("is left") for note in told["notes"])
    assert len(told["base_samples_ms"]) == len(told["head_samples_ms"]) >= 10


@pytest.mark.slow
def test_a_plan_that_computes_something_else_is_wrong(kpt, files, make_plan):
    make_plan("plan", "bf16", *fresh(), "config.max_error=1e-9")
    done, told = checked(kpt)
    assert (done.code, told["verdict"]) == (1, "WRONG")
    assert told["reason"].startswith("the plan computes something else: precision: ")
    assert told["change"] is None


def test_a_plan_that_a_search_holds_is_not_refreshed(kpt, files, make_plan):
    make_plan("plan", "none", *fresh())
    with SearchDirectory(files / "plan"):
        refused(
            kpt("check", "plan", "--refresh"),
            f"another search (pid {os.getpid()}) is writing {files}/plan; "
            "fix: wait for it, stop it, or choose another directory with -o DIR",
        )


@pytest.mark.parametrize("verb", [["check"], ["compare"], ["history", "list"], ["history", "plot"]])
def test_every_verb_has_help(here, verb):
    done = here(*verb, "--help")
    assert done.code == 0
    assert "--history" in done.out


def test_ctrl_c_between_two_commands_keeps_what_was_sampled_and_ends_them(files):
    prints(files, "quick", 10.0)
    (files / "waits.py").write_text("import time\nfrom pathlib import Path\n" + WAITS)
    commands = ("--command", f"{sys.executable} -S quick.py", "--command", f"{sys.executable} -S waits.py")
    with subprocess.Popen(
        [sys.executable, "-m", "kernel_pytorch", "compare", *commands],
        cwd=files, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 60
        while not (files / "waiting").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    *_, kept, last = err.strip().splitlines()
    assert last == "kpt: error: interrupted"
    assert family
    assert psutil.wait_procs(family, timeout=10)[1] == []
    (run,) = exported(files)
    assert (run["verdict"], run["reason"]) == ("INCONCLUSIVE", "interrupted")
    assert (pairs := len(run["head_samples_ms"])) == len(run["base_samples_ms"]) >= 4
    assert kept == f"kpt: the {pairs} pairs sampled until then are kept: kpt history show {run['id'][:10]}"


WAITS = """
n = int(Path("calls").read_text()) + 1 if Path("calls").exists() else 0
Path("calls").write_text(str(n))
if n == 12:
    Path("waiting").touch()
    time.sleep(600)
print(10.0 + 8 * (n % 2))
"""


def exported(files: Path) -> list[dict]:
    done = forks.python("-m", "kernel_pytorch", "history", "export", cwd=files)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_sampled_and_leaves_no_process(files, make_plan):
    make_plan("plan", "none", *fresh())
    (files / "tmp").mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "kernel_pytorch", "check", "plan", "--budget", "60", "--max-slowdown", "1e-9"],
        cwd=files, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(files / "tmp"), "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 100
        while not (found := sampled(files / "tmp")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert found, err
    assert process.returncode == 130
    assert out == ""
    assert err.strip().splitlines()[-1] == "kpt: error: interrupted"
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    (run,) = exported(files)
    assert (run["verdict"], run["reason"]) == ("INCONCLUSIVE", "interrupted")
    assert len(run["head_samples_ms"]) == len(run["base_samples_ms"]) >= 4


def sampled(directory: Path) -> bool:
    """Return whether a check whose temporary directory this is has taken samples."""
    return any(path.stat().st_size > 100 for path in directory.glob("kpt-check-*/samples-*.jsonl"))
