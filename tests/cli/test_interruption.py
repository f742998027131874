"""A search that is interrupted, killed or started twice: no finished trial is lost, and each is told what to do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SLOW_AFTER_TWO = """
import time
import torch
from pathlib import Path
from torch import nn

def net():
    # Each trial builds its model in a worker of its own: once two are in the journal, the third waits here.
    journal = Path("out/trials.jsonl")
    while Path("slowly").exists() and journal.exists() and len(journal.read_text().splitlines()) > 2:
        time.sleep(0.05)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)), torch.randn(32, 128)
"""
ASKED = ("optimize", "slowly.py:net", "--budget", "120", "--only", "dtype,threads,prepack", "-o", "out")


@pytest.fixture
def search(files: Path) -> Callable[..., object]:
    """Return a context manager that runs a search until two of its trials are in the journal, and hangs then."""
    (files / "slowly.py").write_text(SLOW_AFTER_TWO)
    (files / "slowly").touch()

    @contextmanager
    def start() -> Iterator[subprocess.Popen[str]]:
        with (files / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "kernel_pytorch", *ASKED],
                cwd=files,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            try:
                wait_for(lambda: len(finished(files)) >= 2, process, files / "log")
                yield process
            finally:
                process.kill()
                process.communicate()

    return start


def finished(files: Path) -> list[dict]:
    """Return the trials of the journal."""
    journal = files / "out" / "trials.jsonl"
    return [json.loads(line) for line in journal.read_text().splitlines()[1:]] if journal.exists() else []


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def resumed_without_repeating(kpt, files: Path, before: list[dict]) -> None:
    (files / "slowly").unlink()
    done = kpt(*ASKED, "--resume", "--format", "json")
    assert done.code == 0, done.err
    trials = finished(files)
    assert trials[: len(before)] == before
    screened = [json.dumps(t["candidate"]) for t in trials if t["phase"] == "screen"]
    assert len(screened) == len(set(screened)), "a finished trial was run again"
    told = json.loads(done.out)
    # On a loaded machine rates differ from one survey to the next, and may leave nothing that promises a gain.
    hopeless = [u for u in told["untried"] if u["reason"].startswith("predicted to gain")]
    assert len(trials) > len(before) or hopeless, "the search went on, or said why not"
    assert len(told["trials"]) >= len(trials)
    assert (files / "out" / "report.html").exists()


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished_and_resume_goes_on(kpt, files, search):
    with search() as process:
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 130
        assert out == ""
    last = (files / "log").read_text().strip().splitlines()[-1]
    assert last.startswith("kpt: error: interrupted; finished trials are kept, continue with: kpt optimize")
    assert last.endswith("--resume")
    assert "Traceback" not in (files / "log").read_text()
    resumed_without_repeating(kpt, files, finished(files))


@pytest.mark.slow
def test_kill_9_loses_no_finished_trial_and_a_second_search_is_refused_meanwhile(kpt, files, search):
    with search() as process:
        second = kpt(*ASKED)
        assert second.code == 2
        assert second.out == ""
        assert f"another search (pid {process.pid}) is writing" in second.err
        assert len(second.err.splitlines()) == 1
        process.kill()
        process.wait()
    with (files / "out" / "trials.jsonl").open("a") as journal:
        journal.write('{"candidate": {"ste')  # as if killed in mid-write
    before = [json.loads(line) for line in (files / "out" / "trials.jsonl").read_text().splitlines()[1:-1]]
    assert len(before) >= 2
    resumed_without_repeating(kpt, files, before)
