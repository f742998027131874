"""A search's directory: one writer, trials that survive a kill, a plan that is never half written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from plans import BF16, device, plan, trial, workload

from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.types import Mode, Step, TensorSignature
from kernel_pytorch.errors import OutputDirectoryError, PlanError
from kernel_pytorch.plan.schema import dumps
from kernel_pytorch.plan.store import SearchDirectory, load_plan, write_text

CONFIG = KernelPyTorchConfig()


def begin(store, *, resume=True, spec=None, machine=None, config=CONFIG):
    return store.begin(spec or workload(), machine or device(), config, resume=resume)


def test_a_resumed_search_finds_its_trials(tmp_path):
    first, second = trial(BF16), trial(Step("threads", {"intra": 2}))
    with SearchDirectory(tmp_path / "new" / "dir") as store:
        assert begin(store, resume=False) == ()
        store.append(first)
        store.append(second)
    with SearchDirectory(tmp_path / "new" / "dir") as store:
        assert begin(store) == (first, second)
        store.append(first)
    with SearchDirectory(tmp_path / "new" / "dir") as store:
        assert begin(store) == (first, second, first)


def test_without_resume_a_new_journal_begins_and_the_old_one_is_kept(tmp_path):
    with SearchDirectory(tmp_path) as store:
        begin(store, resume=False)
        store.append(trial(BF16))
    with SearchDirectory(tmp_path) as store:
        assert begin(store, resume=False) == ()
    with SearchDirectory(tmp_path) as store:
        assert begin(store) == ()
    assert "bfloat16" in (tmp_path / "trials.previous.jsonl").read_text()


def test_a_longer_budget_continues_and_anything_else_refuses(tmp_path):
    with SearchDirectory(tmp_path) as store:
        begin(store, resume=False)
        store.append(trial(BF16))
    with SearchDirectory(tmp_path) as store:
        assert len(begin(store, config=CONFIG.but(budget_s=9999.0))) == 1
    others = {
        "model": {"spec": workload(fingerprint="e" * 16)},
        "inputs": {"spec": workload(signatures={"main": (TensorSignature((3, 4), "float32"),)})},
        "device": {"machine": device(num_devices=64)},
        "software.torch": {"machine": device(software={"torch": "2.14.0", "python": "3.11"})},
        "config.max_error": {"config": CONFIG.but(max_error=0.5)},
        "config.mode": {"config": CONFIG.but(mode=Mode.TRAINING)},
    }
    for what, changed in others.items():
        with SearchDirectory(tmp_path) as store, pytest.raises(OutputDirectoryError, match=what) as caught:
            begin(store, **changed)
        assert "--resume" in caught.value.fix


@pytest.mark.parametrize("cut", [1, 5, 50, -1])
def test_a_line_cut_by_a_kill_is_dropped_and_writing_goes_on(tmp_path, cut):
    with SearchDirectory(tmp_path) as store:
        begin(store, resume=False)
        store.append(trial(BF16))
    journal = tmp_path / "trials.jsonl"
    whole = journal.read_bytes()
    line = whole.splitlines()[-1]
    journal.write_bytes(whole + line[:cut])
    with SearchDirectory(tmp_path) as store:
        assert begin(store) == (trial(BF16),)
        store.append(trial())
    with SearchDirectory(tmp_path) as store:
        assert begin(store) == (trial(BF16), trial())


def test_a_header_cut_by_a_kill_starts_over(tmp_path):
    (tmp_path / "trials.jsonl").write_text('{"journal_ver')
    with SearchDirectory(tmp_path) as store:
        assert begin(store) == ()
        store.append(trial(BF16))
    with SearchDirectory(tmp_path) as store:
        assert begin(store) == (trial(BF16),)


@pytest.mark.parametrize("damage", ["nonsense\n", "[]\n", '{"a": 1}\n'])
def test_a_journal_that_is_none_is_refused(tmp_path, damage):
    (tmp_path / "trials.jsonl").write_text(damage)
    with SearchDirectory(tmp_path) as store, pytest.raises(OutputDirectoryError):
        begin(store)


def test_a_damaged_trial_is_told_with_its_line(tmp_path):
    with SearchDirectory(tmp_path) as store:
        begin(store, resume=False)
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write('{"candidate": 3}\n')
    with SearchDirectory(tmp_path) as store, pytest.raises(OutputDirectoryError, match="line 2"):
        begin(store)


def test_the_second_search_is_refused_with_the_pid_of_the_first(tmp_path):
    with (
        SearchDirectory(tmp_path),
        pytest.raises(OutputDirectoryError, match=f"pid {os.getpid()}"),
        SearchDirectory(tmp_path),
    ):
        pass
    with SearchDirectory(tmp_path):
        pass  # free again


def test_a_kill_loses_no_finished_trial_and_frees_the_lock(tmp_path):
    code = f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_plan_store import *
        with SearchDirectory({str(tmp_path)!r}) as store:
            begin(store, resume=False)
            for _ in range(3):
                store.append(trial(BF16))
            print("ready", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with pytest.raises(OutputDirectoryError, match=str(process.pid)), SearchDirectory(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with SearchDirectory(tmp_path) as store:
        assert begin(store) == (trial(BF16),) * 3


def test_a_directory_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputDirectoryError, match="cannot write") as caught, SearchDirectory(tmp_path / "file"):
        pass
    assert "-o" in caught.value.fix


def test_the_plan_is_replaced_whole(tmp_path, monkeypatch):
    with SearchDirectory(tmp_path) as store:
        assert load_plan(store.write_plan(plan())).created == plan().created
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OutputDirectoryError, match="No space left"):
            store.write_plan(replace(plan(), created="later"))
    assert load_plan(tmp_path).created == plan().created
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "plan.json"]


def test_plans_load_from_a_file_or_its_directory(tmp_path):
    write_text(tmp_path / "plan.json", dumps(plan()))
    assert repr(load_plan(tmp_path)) == repr(load_plan(tmp_path / "plan.json")) == repr(plan())
    with pytest.raises(PlanError, match="no plan at"):
        load_plan(tmp_path / "nothing")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot be read"):
        load_plan(tmp_path / "binary")


def test_artifacts_are_beside_the_plan(tmp_path):
    with SearchDirectory(tmp_path) as store:
        assert store.make_artifacts() == tmp_path / "artifacts"
    assert (tmp_path / "artifacts").is_dir()
