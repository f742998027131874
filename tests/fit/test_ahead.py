"""Whatever ends a child of the ahead-of-time path is an error here, with its last words."""

from __future__ import annotations

import pickle
import time
from pathlib import Path

import pytest

from kernel_pytorch.backends.tpu import ahead
from kernel_pytorch.errors import KptError, TargetError

WORKER = """
import os, pickle, sys, time
from kernel_pytorch.backends.tpu.workers import serve
from kernel_pytorch.errors import TargetError

def work(request):
    what = pickle.loads(request)
    if what == "abort":
        sys.stderr.write("I0000 harmless\\nF0000 client.cc:7] Check failed: no device\\n*** stack ***\\n")
        sys.stderr.flush()
        os.abort()
    if what == "sleep":
        time.sleep(60)
    if what == "target":
        raise TargetError("no file", fix="make one")
    if what == "bug":
        raise IndexError("out of range\\nmore")
    if what == "leave":
        sys.stderr.write("gone\\n")
        sys.stderr.flush()
        os._exit(3)
    return {"answer": what}

if __name__ == "__main__":
    serve(work)
"""


@pytest.fixture(autouse=True)
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ahead_worker_of_a_test.py").write_text(WORKER, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))


def ask(what: str, timeout_s: float = 120.0) -> object:
    return ahead._in_child("ahead_worker_of_a_test", pickle.dumps(what), timeout_s)


def test_an_answer_comes_back_and_errors_keep_their_class_and_fix() -> None:
    assert ask("hello") == {"answer": "hello"}
    with pytest.raises(TargetError, match="no file") as caught:
        ask("target")
    assert caught.value.fix == "make one"
    with pytest.raises(KptError, match=r"IndexError: out of range$") as bug:
        ask("bug")
    assert "in work" in bug.value.user_traceback


def test_an_abort_is_an_error_with_the_fatal_line() -> None:
    with pytest.raises(ahead.AheadError, match=r"died by SIGABRT.*Check failed: no device"):
        ask("abort")
    with pytest.raises(ahead.AheadError, match=r"exited with code 3.*gone"):
        ask("leave")


def test_a_deadline_ends_the_child() -> None:
    began = time.monotonic()
    with pytest.raises(ahead.AheadError, match="longer than 5 s"):
        ask("sleep", timeout_s=5.0)
    assert time.monotonic() - began < 40


def test_children_do_not_take_the_plugin_of_an_emulation_for_the_compiler(monkeypatch):
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/somewhere/libpjrt_shim.so")
    monkeypatch.setenv("KEPT", "yes")
    environment = ahead._environment()
    assert "TPU_LIBRARY_PATH" not in environment
    assert environment["KEPT"] == "yes"
