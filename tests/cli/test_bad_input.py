"""Bad input gets one clear line on stderr, exit code 2, nothing on stdout, and never a traceback of ours."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WITHOUT_TORCH = {
    "unknown command": (["optimise", "x"], "did you mean optimize"),
    "unknown option": (["detect", "--colour"], "No such option"),
    "missing target": (["optimize"], "Missing argument 'TARGET'"),
    "superfluous argument": (["detect", "x"], "unexpected extra argument"),
    "format": (["detect", "--format", "yaml"], "'yaml' is not one of"),
    "mode": (["optimize", "x:y", "--mode", "serving"], "'serving' is not one of"),
    "budget name": (["optimize", "x:y", "--budget", "long"], "neither quick, default, thorough nor a positive number"),
    "budget zero": (["optimize", "x:y", "--budget", "0"], "'0' is neither"),
    "budget nan": (["optimize", "x:y", "--budget", "nan"], "'nan' is neither"),
    "budget infinite": (["optimize", "x:y", "--budget", "inf"], "'inf' is neither"),
    "max error": (["optimize", "x:y", "--max-error", "small"], "'small' is not a number"),
    "max error zero": (["optimize", "x:y", "--max-error", "0"], "must be above 0"),
    "max error nan": (["optimize", "x:y", "--max-error", "nan"], "must be above 0"),
    "min gain": (["optimize", "x:y", "--min-gain", "1"], "from 0 and below 1"),
    "seed": (["optimize", "x:y", "--seed", "-1"], "-1 is not in the range"),
    "isolation": (["optimize", "x:y", "--isolation", "docker"], "'docker' is not one of"),
    "level": (["validate", "x:y", "x:y", "--level", "hard"], "'hard' is not one of"),
    "no plan": (["explain", "nowhere"], "no plan at nowhere"),
    "output not writable": (["optimize", "nets.py:net", "-o", "nets.py/out"], "cannot write"),
    "output is a file": (["optimize", "nets.py:net", "-o", "nets.py"], "cannot write"),
}

WITH_TORCH = {
    "target without factory": (["predict", "nets.py"], "names no factory; it has: net"),
    "no file": (["predict", "nest.py:net"], "did you mean 'nets.py'"),
    "no factory": (["predict", "nets.py:nett"], "did you mean 'net'"),
    "no module": (["predict", "no_such_module:net"], "no module 'no_such_module'"),
    "not understood": (["predict", "resnet18"], "expected path/file.py:factory"),
    "returns something else": (["predict", "nets.py:nothing"], "got a int; expected a Workload"),
    "export without trust": (["predict", "net.pt2"], "may run code"),
    "unknown transform": (["optimize", "nets.py:net", "-o", "o", "--only", "dtyp"], "did you mean dtype"),
    "only and exclude": (["predict", "nets.py:net", "--only", "dtype", "--exclude", "dtype"], "both in only and"),
    "NaN": (["predict", "nets.py:nan"], "NaN"),
}


def one_line(done, says: str) -> None:
    assert done.code == 2, done
    assert done.out == ""
    lines = [line for line in done.err.splitlines() if line != "the user's own print"]
    assert len(lines) == 1, done.err
    assert lines[0].startswith("kpt: error: "), done.err
    assert says in lines[0]
    assert "Traceback" not in done.err


@pytest.mark.parametrize("case", WITHOUT_TORCH)
def test_misuse(kpt, case):
    arguments, says = WITHOUT_TORCH[case]
    one_line(kpt(*arguments), says)


@pytest.mark.parametrize("case", WITH_TORCH)
def test_unusable_targets(kpt, files, case):
    import zipfile

    with zipfile.ZipFile(files / "net.pt2", "w") as archive:
        archive.writestr("x", "y")
    arguments, says = WITH_TORCH[case]
    one_line(kpt(*arguments), says)


@pytest.mark.parametrize(
    ("target", "line"),
    [("nets.py:raises", 'raise RuntimeError("the user\'s own error")'), ("nets.py:misfit", "self.first(x)")],
)
def test_what_the_users_code_raises_shows_their_traceback_and_then_one_line(kpt, target, line):
    done = kpt("predict", target)
    assert done.code == 2
    assert done.out == ""
    assert line in done.err
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("kpt: error: ")
    assert "kernel_pytorch/" not in done.err


PLANS = {
    "another model": ("nets.py:wide", [], "another model"),
    "another device": ("nets.py:net", ['device.arch="sm_90"', 'device.vendor="nvidia"'], "another device"),
    "newer schema": ("nets.py:net", ["schema_version=99"], "reads up to"),
    "corrupted": ("nets.py:net", ['chosen.status="great"'], "corrupted at chosen.status"),
    "corrupted config": ("nets.py:net", ["config.max_error=-1"], "configuration is corrupted"),
    "unknown transform": ("nets.py:net", ['chosen.candidate.steps.0.transform="dtyp"'], "dtyp"),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_that_does_not_fit(kpt, files, case, make_plan):
    target, changes, says = PLANS[case]
    if case == "unknown transform":
        make_plan("plan", "bf16")
        text = (files / "plan" / "plan.json").read_text()
        (files / "plan" / "plan.json").write_text(text.replace('"transform": "dtype"', '"transform": "dtyp"'))
        one_line(kpt("eject", "plan", target), says)
        return
    make_plan("plan", "bf16", *changes)
    one_line(kpt("apply", "plan", target), says)


def test_a_second_search_in_one_directory_is_refused(kpt, files):
    code = (
        "from kernel_pytorch.plan.store import SearchDirectory\n"
        "with SearchDirectory('out'):\n    print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=files, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        one_line(kpt("optimize", "nets.py:net", "-o", "out"), f"another search (pid {holder.pid})")
        holder.communicate("\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_refused(kpt, files):
    (files / "locked").mkdir(mode=0o500)
    one_line(kpt("optimize", "nets.py:net", "-o", "locked/out"), "cannot write")
