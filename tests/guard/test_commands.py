"""Commands as sides: what they may print, how they fail, that they take turns and leave nothing behind."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from kernel_pytorch.core.types import Verdict
from kernel_pytorch.guard.commands import CommandError, parse_times
from kernel_pytorch.guard.compare import compare_sides
from kernel_pytorch.guard.side_by_side import Limits, Side
from kernel_pytorch.guard.types import Comparison


def script(where: Path, name: str, body: str) -> tuple[str, ...]:
    """Write a shell script; `$1` is a file in which it counts its invocations, `$n` their number."""
    path = where / f"{name}.sh"
    path.write_text(f"#!/bin/sh\nn=$(cat {path}.n 2>/dev/null || echo 0); n=$((n + 1)); echo $n > {path}.n\n{body}\n")
    path.chmod(0o755)
    return (str(path),)


def run(base: tuple[str, ...], head: tuple[str, ...], **options: object) -> Comparison:
    sides = Side("base", command=base), Side("head", command=head)
    return compare_sides(*sides, **{"max_seconds": 30.0, "max_pairs": 20, **options})  # type: ignore[arg-type]


def test_times_are_one_number_a_line() -> None:
    assert parse_times("1.5\n\n 2e0 \r\n3", "x") == (1.5, 2.0, 3.0)
    for wrong in ("1.5 ms", "time: 3", "1 2", "nan", "inf", "-1", "0", "{}", "1_0x"):
        with pytest.raises(CommandError, match="not a time in milliseconds") as caught:
            parse_times(f"1.0\n{wrong}\n", "x")
        assert repr(wrong) in str(caught.value)
        assert "(line 2)" in str(caught.value)
    with pytest.raises(CommandError, match="printed no time"):
        parse_times(" \n\n", "x")
    with pytest.raises(CommandError) as caught:
        parse_times("x" * 500, "x")
    assert len(str(caught.value)) < 250


def test_slower_command_fails_and_the_first_invocations_do_not_count(tmp_path: Path) -> None:
    base = script(tmp_path, "base", "echo noise >&2; if [ $n = 1 ]; then echo 900; else echo 10; fi")
    head = script(tmp_path, "head", "if [ $n = 1 ]; then echo 1; else echo 11; fi")
    found = run(base, head)
    assert found.verdict is Verdict.FAIL
    assert set(found.base_samples_ms) == {10.0}
    assert set(found.head_samples_ms) == {11.0}
    assert found.name == head[0] or found.name == base[0]
    assert found.base.software == {}


@pytest.mark.skipif(sys.platform != "linux", reason="the lock of the device is flock's")
def test_a_command_may_take_the_lock_of_the_device() -> None:
    code = "from kernel_pytorch.backends import lock; held = lock.exclusive('cpu'); held.__enter__(); print(1)"
    command = (sys.executable, "-c", code)
    assert len(run(command, command, max_pairs=2, limits=Limits(hang=30.0)).head_samples_ms) == 2


def test_invocations_take_turns(tmp_path: Path) -> None:
    log = tmp_path / "log"
    sides = [script(tmp_path, name, f"echo {name} >> {log}; echo 10") for name in ("base", "head")]
    run(*sides, max_pairs=4)
    turns = log.read_text().split()
    assert turns[:2] == ["base", "head"]
    assert len(turns) == 10
    turns = turns[2:]
    for block in (turns[:4], turns[4:]):
        assert block in (["base", "head", "head", "base"], ["head", "base", "base", "head"])


def test_many_lines_are_one_sample_or_one_each(tmp_path: Path) -> None:
    command = script(tmp_path, "many", "echo 1; echo 3; echo 50")
    found = run(command, command, max_pairs=2)
    assert found.head_samples_ms == (3.0, 3.0)
    sides = [Side(label, command=command, per_line=True) for label in ("base", "head")]
    found = compare_sides(*sides, max_pairs=6, max_seconds=30.0)
    assert found.head_samples_ms == (1.0, 3.0, 50.0) * 2


def test_bad_output_from_the_start_is_an_error_and_later_inconclusive(tmp_path: Path) -> None:
    good = script(tmp_path, "good", "echo 10")
    with pytest.raises(CommandError, match=r"head: .*'Elapsed: 3 s'"):
        run(good, script(tmp_path, "bad", "echo 'Elapsed: 3 s'"))
    found = run(good, script(tmp_path, "later", "if [ $n -gt 6 ]; then echo oops; else echo 10; fi"), max_pairs=400)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "'oops'" in found.reason
    assert len(found.head_samples_ms) >= 2


def test_failing_command_is_inconclusive_with_what_it_said(tmp_path: Path) -> None:
    good = script(tmp_path, "good", "echo 10")
    at_once = run(good, script(tmp_path, "once", "echo 10; echo 'no GPU' >&2; exit 7"))
    later = run(good, script(tmp_path, "later", "if [ $n -gt 6 ]; then echo 'no GPU' >&2; exit 7; fi; echo 10"))
    killed = run(good, script(tmp_path, "killed", "kill -9 $$"))
    for found in (at_once, later):
        assert found.verdict is Verdict.INCONCLUSIVE
        assert "exited with code 7" in found.reason
        assert any("no GPU" in note for note in found.notes)
    assert at_once.head_samples_ms == ()
    assert len(later.head_samples_ms) >= 2
    assert "SIGKILL" in killed.reason


def test_hanging_command_is_ended_with_its_children(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    body = f"if [ $n -gt 4 ]; then sleep 600 & echo $! > {pid_file}; echo waiting >&2; wait; fi; echo 10"
    found = run(script(tmp_path, "good", "echo 10"), script(tmp_path, "hangs", body), limits=Limits(hang=1.0))
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "did not end within" in found.reason
    assert any("waiting" in note for note in found.notes)
    child = int(pid_file.read_text())
    for _ in range(50):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the command's own child is still there")


def test_command_that_does_not_exist() -> None:
    with pytest.raises(Exception, match=r"cannot start /no/such/thing.*No such file") as caught:
        run(("/no/such/thing",), ("true",))
    assert type(caught.value).__name__ == "KptError"


def test_python_of_a_side_comes_first_on_the_path_of_its_command() -> None:
    command = ("python", "-c", "import sys; print(sys.executable, file=sys.stderr); print(1.0)")
    sides = [Side(label, command=command, python=sys.executable) for label in ("base", "head")]
    found = compare_sides(*sides, max_pairs=2, max_seconds=30.0)
    assert len(found.head_samples_ms) == 2
    assert {"python", "torch"} <= {*found.base.software}
