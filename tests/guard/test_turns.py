"""What the two sides' turns share: none runs into the other's, both run on the core of the turn before."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from kernel_pytorch.core.types import Verdict
from kernel_pytorch.guard import compare, side_by_side, turns
from kernel_pytorch.guard.side_by_side import Limits, Side, WorkerRunner
from kernel_pytorch.guard.turns import take_turns
from kernel_pytorch.guard.types import SideFacts

linux = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux' /proc")


@pytest.fixture
def worker() -> ModuleType:
    path = Path(side_by_side.__file__).with_name("worker.py")
    spec = importlib.util.spec_from_file_location("guard_worker", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Busy(threading.Thread):
    """Computes without the interpreter's lock, as an OpenMP thread does that looks for more work."""

    def __init__(self, rounds: int) -> None:
        super().__init__(daemon=True)
        self.rounds = rounds

    def run(self) -> None:
        hashlib.pbkdf2_hmac("sha256", b"", b"", self.rounds)


@linux
def test_a_turn_ends_when_the_threads_of_its_process_have_come_to_rest(
    worker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_REST_S", 60.0)
    session, thread = worker._Session(), Busy(300_000)
    thread.start()
    time.sleep(0.01)
    assert worker._others_run()
    session._rest()
    thread.join(0.02)
    assert not thread.is_alive()
    assert not worker._others_run()


@linux
def test_a_thread_that_never_rests_is_waited_for_a_few_times_only(
    worker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_REST_S", 0.05)
    monkeypatch.setattr(worker, "_others_run", lambda: True)
    session, waits = worker._Session(), []
    for _ in range(worker._RESTLESS + 2):
        began = time.monotonic()
        session._rest()
        waits.append(time.monotonic() - began)
    assert min(waits[: worker._RESTLESS]) >= 0.05
    assert max(waits[worker._RESTLESS :]) < 0.05


@linux
def test_a_turn_moves_to_a_core_and_is_not_bound_to_it(worker: ModuleType) -> None:
    allowed = os.sched_getaffinity(0)
    for core in [*sorted(allowed), *sorted(allowed)]:
        seen = []
        for _ in range(5):  # the system may move it again at any time, but not every time
            worker._move_to(core)
            seen.append(worker._core())
        assert core in seen
        assert os.sched_getaffinity(0) == allowed
    worker._move_to(max(allowed) + 1)
    worker._move_to(None)
    assert os.sched_getaffinity(0) == allowed


class Followed(WorkerRunner):
    """A worker that tells which core it was asked to run on, and ends on another."""

    def __init__(self, label: str, told: list[tuple[str, int | None]]) -> None:
        super().__init__(Side(label, "x.py:y"))
        self.log = told

    def begin(self) -> None:
        self.log.append((f"begin {self.side.label}", None))

    def load(self, limits: Limits) -> None:
        self.log.append((f"load {self.side.label}", None))

    def warm_up(self, limit_s: float) -> float:
        self.call_ms["main"] = 10.0
        return 10.0

    def sample(self) -> Sequence[float]:
        self.log.append((self.side.label, self.core))
        self.core = len(self.log)
        return (10.0,)


def test_each_turn_is_taken_on_the_core_of_the_turn_before() -> None:
    told: list[tuple[str, int | None]] = []
    sides = Followed("base", told), Followed("head", told)
    take_turns(*sides, done=lambda *_: False, limits=Limits(sampling=60.0), max_pairs=6)
    assert [core for _, core in told] == [None, *range(1, 12)]
    assert {label for label, _ in told} == {"base", "head"}


def test_both_sides_import_before_the_first_loads() -> None:
    told: list[tuple[str, int | None]] = []
    sides = Followed("base", told), Followed("head", told)
    compare._load(sides, Limits(), lambda _: None, same_model=False)
    assert [what for what, _ in told] == ["begin base", "begin head", "load base", "load head"]


def test_fresh_processes_have_the_time_for_as_many_pairs_as_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that became busy: the first 16 pairs took 4 of 20 s, the 12 of a fresh pair of processes take 8."""
    clock, made = [0.0], []

    class Timed(Followed):
        def sample(self) -> Sequence[float]:
            clock[0] += 4.0 / 32 if len(made) <= 2 else 8.0 / 24
            return (10.0 if self.side.label == "base" else 11.0,)

    @contextlib.contextmanager
    def sides(*_: Side) -> Iterator[tuple[Timed, Timed]]:
        made.extend(Timed(label, []) for label in ("base", "head"))
        yield made[-2], made[-1]

    monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(compare, "_sides", sides)
    monkeypatch.setattr(compare, "_facts", lambda *_, **__: [SideFacts("base"), SideFacts("head")])
    side = Side("base", "x.py:y")
    found = compare.compare_sides(side, side, max_seconds=20.0, same_model=False, profile=False)
    assert found.verdict is Verdict.FAIL, found.reason
    assert "confirmed by +10.0 % in 3 fresh pairs of processes" in found.reason
    assert len(found.base_samples_ms) == 16 + 3 * 16
