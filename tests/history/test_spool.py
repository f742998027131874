"""Runs whose database takes them not, or not now: they stay on the local disk, and are sent later."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_pytorch.guard.history import History, HistoryError
from kernel_pytorch.guard.history.spool import Spool
from tests.history.made import make_run

ROOT = Path(__file__).parents[2]
RECORD = """
import sys
from kernel_pytorch.guard.history import History
from tests.history.made import make_run
history = History(sys.argv[1], wait_s=1)
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    receipt = history.record(make_run(number))
print(receipt.stored, receipt.waiting, receipt.message, receipt.fix)
"""


def run_python(code: str, *arguments: str, limit_bytes: int | None = None, **environment: str) -> str:
    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], preexec_fn=limit, cwd=ROOT, capture_output=True, text=True,
        timeout=60, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def block(*packages: str) -> str:
    """Return code that makes packages look as if they were not installed."""
    return f"import sys; sys.modules.update(dict.fromkeys({packages!r}))\n"


def test_a_database_that_stays_locked_costs_no_run(tmp_path):
    path = tmp_path / "h.sqlite"
    history = History(str(path), wait_s=0.1)
    history.record(make_run(0))
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    receipt = history.record(make_run(1))
    assert not receipt.stored
    assert "locked" in receipt.message
    assert str(history.waiting()[0]) in receipt.message
    assert "fuser" in receipt.fix
    assert [run.id for run in history.runs()] == ["run-000000"], "readers do not wait for a writer"
    holder.execute("ROLLBACK")
    holder.close()
    receipt = history.record(make_run(2))
    assert (receipt.stored, receipt.sent, receipt.waiting) == (True, 1, 0)
    assert [run.id for run in history.runs()] == ["run-000000", "run-000001", "run-000002"]


def test_a_server_that_is_away_costs_no_run_and_no_password(tmp_path, state):
    history = History(f"postgresql://me:s3cret@/db?host={tmp_path}", wait_s=2)
    receipt = history.record(make_run())
    assert not receipt.stored
    assert receipt.waiting == 1
    assert "sent later" in receipt.message
    with pytest.raises(HistoryError, match="1 runs wait in") as caught:
        history.runs()
    seen = [receipt.message, receipt.fix, str(caught.value), *(p.read_text("utf-8") for p in state.rglob("*.json"))]
    assert len(seen) == 4
    assert "s3cret" not in "".join(seen)


def test_a_server_that_does_not_exist_is_named_by_flush():
    history = History("postgresql://me@localhost:1/db", wait_s=2)
    assert history.flush().stored
    history.record(make_run())
    receipt = history.flush()
    assert (receipt.stored, receipt.sent, receipt.waiting) == (False, 0, 1)
    assert "localhost:1" in receipt.message


def test_runs_wait_for_their_own_history(tmp_path):
    away = History(f"postgresql://me@/db?host={tmp_path}", wait_s=2)
    away.record(make_run(1))
    here = History(str(tmp_path / "h.sqlite"))
    here.record(make_run(2))
    assert [run.id for run in here.runs()] == ["run-000002"]
    assert len(away.waiting()) == 1


@pytest.mark.parametrize("damage", ["not a database at all, but long enough to be looked at" * 100, "page"])
def test_a_damaged_file_says_how_to_mend_it(damage, tmp_path):
    path = tmp_path / "h.sqlite"
    history = History(str(path))
    for number in range(40):
        history.record(make_run(number))
    if damage == "page":
        content = bytearray(path.read_bytes())
        content[4096:] = b"\xa5" * (len(content) - 4096)
        path.write_bytes(content)
    else:
        path.write_text(damage)
    with pytest.raises(HistoryError) as caught:
        History(str(path)).runs()
    assert f"mv {path} {path}.damaged" in caught.value.fix
    receipt = History(str(path)).record(make_run(99))
    assert not receipt.stored
    assert "mv " in receipt.fix
    shutil.move(path, f"{path}.damaged")
    assert [run.id for run in History(str(path)).runs()] == ["run-000099"]


def test_a_place_that_cannot_be_written_costs_no_run(tmp_path):
    (tmp_path / "file").write_text("")
    history = History(str(tmp_path / "file" / "h.sqlite"))
    receipt = history.record(make_run())
    assert (receipt.stored, receipt.waiting) == (False, 1)
    assert "--history" in receipt.fix


def test_a_full_state_directory_is_answered_by_the_next_place(tmp_path, state):
    state.parent.mkdir()
    state.write_text("a file where a directory should be")
    history = History(f"postgresql://me@/db?host={tmp_path}", wait_s=2)
    receipt = history.record(make_run())
    (kept,) = history.waiting()
    assert kept.is_relative_to(tmp_path / "tmp")
    assert str(kept) in receipt.message


def test_somebody_elses_temporary_directory_is_not_used(tmp_path, state):
    state.parent.mkdir()
    state.write_text("")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "tmp" / f"kernel_pytorch-spool-{os.getuid()}").symlink_to(tmp_path / "theirs")
    history = History(f"postgresql://me@/db?host={tmp_path}", wait_s=2)
    receipt = history.record(make_run())
    assert "NOT in the history" in receipt.message
    assert "somebody else" in receipt.message
    assert list((tmp_path / "theirs").iterdir()) == []


def test_no_space_for_anything_is_told_and_nothing_raises(tmp_path):
    said = run_python(RECORD, str(tmp_path / "h.sqlite"), "0", "1", limit_bytes=0)
    assert said.startswith("False 0 this run is NOT in the history")
    assert str(tmp_path / "state") in said
    assert str(tmp_path / "tmp") in said
    assert "File too large" in said
    assert "free some space" in said


def test_a_database_that_cannot_grow_leaves_runs_in_the_spool(tmp_path):
    path = str(tmp_path / "h.sqlite")
    said = run_python(RECORD, path, "0", "60", limit_bytes=80_000)
    history = History(path)
    waiting = len(history.waiting())
    assert 0 < waiting < 60
    assert said.startswith(f"False {waiting} this run is kept in")
    assert sorted(run.id for run in history.runs()) == [make_run(number).id for number in range(60)]
    assert history.waiting() == []


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mounted = shutil.which("mount") and os.getuid() == 0
    done = mounted and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192k", "none", str(place)], check=False)
    if not done or done.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_keeps_what_fits_and_takes_the_rest_elsewhere(small_disk, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(small_disk))
    history = History()
    receipts = [history.record(make_run(number)) for number in range(80)]
    assert receipts[0].stored
    assert not receipts[-1].stored
    kept = history.waiting()
    assert any(path.is_relative_to(small_disk.parent / "tmp") for path in kept)
    assert sum(receipt.stored for receipt in receipts) + len(kept) >= 80
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert sorted(run.id for run in history.runs()) == [make_run(number).id for number in range(80)]
    assert history.waiting() == []


def test_a_damaged_waiting_file_is_set_aside_and_told(tmp_path):
    away = History(f"postgresql://me@/db?host={tmp_path}", wait_s=2)
    for number in range(3):
        away.record(make_run(number))
    spool = Spool(away.address)
    first, second, third = spool.files()
    second.write_text(second.read_text()[:100])
    assert spool.read(first) == make_run(0)
    with pytest.raises(HistoryError, match="damaged"):
        spool.read(second)
    assert spool.files() == [first, third]
    assert second.with_suffix(".damaged").exists()


def test_a_waiting_file_that_another_process_sent_is_no_error(tmp_path):
    spool = Spool(History(str(tmp_path / "h.sqlite")).address)
    path = spool.add(make_run())
    path.unlink()
    assert spool.read(path) is None
    spool.remove(path)


def test_the_same_run_waits_once(tmp_path):
    spool = Spool(History(str(tmp_path / "h.sqlite")).address)
    assert spool.add(make_run()) == spool.add(make_run())
    assert len(spool.files()) == 1
    assert json.loads(spool.files()[0].read_text())["history"].startswith("sqlite:///")
    assert spool.files()[0].parent.stat().st_mode & 0o077 == 0


def test_what_a_kill_left_between_database_and_disk_is_not_stored_twice(url):
    history = History(url)
    history.record(make_run())
    Spool(history.address).add(make_run())
    receipt = history.flush()
    assert (receipt.stored, receipt.sent) == (True, 1)
    assert history.runs() == [make_run()]


def test_while_another_process_sends_this_one_leaves_it_alone(tmp_path):
    history = History(str(tmp_path / "h.sqlite"))
    spool = Spool(history.address)
    spool.add(make_run(0))
    with spool.only_sender() as alone:
        assert alone
        receipt = history.record(make_run(1))
    assert (receipt.stored, receipt.sent, receipt.waiting) == (True, 0, 1)


def test_without_sqlalchemy_runs_wait_and_are_sent_once_it_is_there(tmp_path):
    path = str(tmp_path / "h.sqlite")
    said = run_python(block("sqlalchemy", "alembic", "psycopg", "otava") + RECORD, path, "0", "3")
    assert said.startswith("False 3 this run is kept in")
    assert "pip install 'kernel-pytorch[history]'" in said
    reading = "from kernel_pytorch.guard.history import History, HistoryError\ntry: History(sys.argv[1]).runs()\n"
    reading += "except HistoryError as error: print(error, error.fix)"
    said = run_python(block("sqlalchemy") + reading, path)
    assert "3 runs wait in" in said
    assert "pip install" in said
    assert [run.id for run in History(path).runs()] == ["run-000000", "run-000001", "run-000002"]


def test_without_psycopg_the_message_says_what_to_install(tmp_path):
    said = run_python(block("psycopg") + RECORD, f"postgresql://me@/db?host={tmp_path}", "0", "1")
    assert said.startswith("False 1 this run is kept in")
    assert "pip install 'kernel-pytorch[history]'" in said


def test_importing_the_history_imports_no_database(tmp_path):
    code = "import sys, kernel_pytorch.guard.history as h; h.History('x.db')\n"
    code += "print({'torch', 'sqlalchemy', 'alembic', 'psycopg', 'otava', 'numpy', 'scipy'} & set(sys.modules))"
    assert run_python(code) == "set()\n"
