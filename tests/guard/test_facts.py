"""What the processes of two sides tell, and what is left where Ctrl-C comes between two phases of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kernel_pytorch.core.types import Verdict
from kernel_pytorch.guard import compare, worker
from kernel_pytorch.guard.compare import InterruptedComparison, compare_sides
from kernel_pytorch.guard.side_by_side import Side, WorkerRunner
from kernel_pytorch.guard.turns import Run

BASE = tuple(10.0 + 0.01 * (i % 5) for i in range(40))
SLOWER = tuple(1.2 * ms for ms in reversed(BASE))


class Told(WorkerRunner):
    """A side without a process: each request is looked up, or presses Ctrl-C."""

    pressed_at = ""
    reasons = 0x4

    def begin(self) -> None:
        pass

    def load(self, limits: object) -> None:
        self.told = {"device_key": "cpu", "structure": ["module (root): Net"], "package": str(Path(__file__).parent)}
        lazily = {"sympy": "1.14"} if self.side.label == "head" else {}
        self.told |= {"software": {"kernel_pytorch": "0", **lazily}, "memory_total_bytes": 1 << 30}
        self.call_ms = {"main": 1.0}
        if self.pressed_at == "load":
            raise KeyboardInterrupt

    def _ask(self, request: Any, limit_s: float, doing: str) -> dict[str, Any]:
        if request["op"] == self.pressed_at:
            raise KeyboardInterrupt
        telemetry = {"throttle_reasons": self.reasons if self.side.label == "head" else 0}
        return {
            "sample": {"ms": 1.0, "core": None, "telemetry": telemetry},
            "counts": {"counts": {"recompilations": 2, "allocator_retries": 1, "foreign_load_cores": 0.5}},
            "peak": {"peak_bytes": 123},
            "versions": {"software": dict.fromkeys(request.get("names", ()), "1.14")},
            "profile": {"kernels_ms": {"aten::mm": 10.0 if self.side.label == "base" else 12.0}},
        }[request["op"]]

    def close(self) -> None:
        pass


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let comparisons run on sides without processes; yields where Ctrl-C is pressed, run by run."""
    presses: list[str] = []

    @contextmanager
    def sides(base: Side, head: Side) -> Iterator[tuple[Told, Told]]:
        made = Told(base), Told(head)
        made[1].pressed_at = presses.pop(0) if presses else ""
        yield made

    def turns(*runners: Told, done: Any, **_: Any) -> Run:
        for one in runners:
            one.sample()
            one.reasons = 0x20
            one.sample()
        done(BASE, SLOWER)
        return Run(BASE, SLOWER, warm_up_calls=3)

    monkeypatch.setattr(compare, "_sides", sides)
    monkeypatch.setattr(compare, "take_turns", turns)
    yield presses
    assert presses == []


def compared(**options: Any) -> Any:
    return compare_sides(Side("base", "m.py:f"), Side("head", "m.py:f", env={"OMP_SCHEDULE": "static"}), **options)


def test_facts_are_those_that_the_processes_told(told: Sequence[str]) -> None:
    found = compared()
    assert found.verdict is Verdict.FAIL
    assert "confirmed by" in found.reason
    assert found.head_samples_ms == 4 * SLOWER, "what raised the suspicion, and three fresh pairs of processes"
    assert found.base.telemetry["throttle_reasons"] == 0
    assert found.head.telemetry["throttle_reasons"] == 0x24, "each bit that was ever set"
    for name, value in (("recompilations", 2), ("allocator_retries", 1), ("foreign_load_cores", 0.5)):
        assert found.head.telemetry[name] == value
    assert found.head.telemetry["memory_total_bytes"] == 1 << 30
    assert found.head.telemetry["warm_up_calls"] == 3
    assert found.head.software["env:OMP_SCHEDULE"] == "static"
    assert found.base.software["sympy"] == "1.14", "installed for both, imported by one"
    assert found.head.peak_bytes == 123
    assert found.head.kernels_ms == {"aten::mm": 12.0}
    kinds = [culprit.kind for culprit in found.culprits]
    assert {"kernels", "software", "clocks"} <= {*kinds}, found.culprits


@pytest.mark.parametrize("phase", ["counts", "peak", "load"])
def test_ctrl_c_after_the_first_run_keeps_its_samples(told: list[str], phase: str) -> None:
    told.extend(["", phase] if phase == "load" else ["", "", "", phase])  # the rest is asked when it is decided
    with pytest.raises(InterruptedComparison) as caught:
        compared()
    found = caught.value.comparison
    assert found.head_samples_ms[: len(SLOWER)] == SLOWER
    assert found.change is not None
    if phase == "load":
        assert found.verdict is Verdict.INCONCLUSIVE
        assert "could not confirm: interrupted" in found.reason
    else:
        assert found.verdict is Verdict.FAIL, "what was decided stays decided"


def test_ctrl_c_before_the_first_sample_leaves_nothing_to_keep(told: list[str]) -> None:
    told.append("load")
    with pytest.raises(KeyboardInterrupt) as caught:
        compared()
    assert not isinstance(caught.value, InterruptedComparison)


def test_variables_that_decide_are_told_and_secrets_are_not() -> None:
    from kernel_pytorch.hardware import detect

    environment = {"CUDA_LAUNCH_BLOCKING": "1", "NVIDIA_API_KEY": "nvapi-123", "TORCH_HUB_TOKEN": "456", "OTHER": "no"}
    found = worker._software(detect("cpu"), environment)
    assert found["env:CUDA_LAUNCH_BLOCKING"] == "1"
    assert not {"nvapi-123", "456", "no"} & {*found.values()}
