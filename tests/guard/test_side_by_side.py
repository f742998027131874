"""Two workers take turns: what is compared, what is refused, and what is left when a side fails. Real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from kernel_pytorch.core.describe import fingerprint
from kernel_pytorch.core.types import Event, Mode, Step, Verdict
from kernel_pytorch.errors import KptError
from kernel_pytorch.guard.compare import compare_sides
from kernel_pytorch.guard.side_by_side import Limits, NotComparableError, Side, SideError
from kernel_pytorch.guard.types import Comparison
from kernel_pytorch.hardware import detect
from kernel_pytorch.plan.schema import dumps
from tests.guard.workloads import quick
from tests.unit import plans

HERE = Path(__file__).parent
TARGETS = HERE / "workloads.py"


def side(label: str, factory: str, **options: object) -> Side:
    return Side(label, f"{TARGETS}:{factory}", **options)  # type: ignore[arg-type]


def run(base: str, head: str, *, mode: str = "inference", hang: float = 60.0, **options: object) -> Comparison:
    options = {"max_seconds": 4.0, "max_pairs": 20, "limits": Limits(hang=hang), **options}
    return compare_sides(side("base", base, mode=mode), side("head", head, mode=mode), **options)  # type: ignore[arg-type]


def no_workers_left() -> bool:
    """Whether no worker of this process is left, after a moment for the kernel to take them away."""
    for _ in range(50):
        left = [p for p in psutil.Process().children(recursive=True) if "worker.py" in " ".join(_command_line(p))]
        if not left:
            return True
        time.sleep(0.1)
    return False


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_slower_head_fails_with_the_facts_of_both_sides() -> None:
    told: list[Event] = []
    found = run("quick", "slow", listen=told.append, name="net", command="kpt compare a b", max_seconds=20.0)
    assert found.verdict is Verdict.FAIL, found
    assert found.change is not None
    assert found.change.low > 1.0
    assert len(found.base_samples_ms) == len(found.head_samples_ms) >= 10
    assert (found.kind, found.name, found.paired, found.command) == ("compare", "net", True, "kpt compare a b")
    for facts, label in ((found.base, "base"), (found.head, "head")):
        assert facts.label == label
        assert {"python", "torch", "kernel_pytorch", "numpy"} <= {*facts.software}
        assert facts.device_key
        assert facts.python == sys.executable
        assert facts.telemetry["warm_up_calls"] >= 2
        assert "cpu_others_percent" not in facts.telemetry
        assert any("addmm" in name or "linear" in name for name in facts.kernels_ms), facts.kernels_ms
        assert facts.peak_bytes
    assert found.base.fingerprint == found.head.fingerprint != ""
    assert "confirmed by" in found.reason
    assert found.culprits
    assert sum("turns" in event.message for event in told) in (4, 6, 9), "once, and three, five or eight times again"
    assert no_workers_left()


def test_training_samples_are_whole_steps() -> None:
    found = run("quick", "quick", mode="training", max_pairs=2)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "too few" in found.reason
    assert found.name == f"{TARGETS}:quick"
    assert len(found.head_samples_ms) == 2


def test_cases_are_weighted_into_one_series() -> None:
    found = run("two_cases", "two_cases", max_pairs=4)
    assert len(found.head_samples_ms) == 4
    assert {"first_call_ms small", "first_call_ms large"} <= {*found.head.telemetry}


@pytest.mark.parametrize(
    ("factory", "why", "tail"),
    [
        ("raises", "raised while being timed: RuntimeError: one call too many", "workloads.py"),
        ("dies", "died by signal 9 (SIGKILL)", "about to be killed"),
        ("hangs", "no answer within 2 s", "about to hang"),
        ("exits", "raised while", "SystemExit"),
    ],
)
def test_failing_side_is_inconclusive_and_keeps_what_was_sampled(factory: str, why: str, tail: str) -> None:
    # So small a slowdown is not ruled out before the side fails.
    found = run("quick", factory, hang=2.0, max_pairs=400, max_seconds=30.0, max_slowdown=1e-4)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.reason.startswith("head: ")
    assert why in found.reason
    assert any(tail in note for note in found.notes), found.notes
    assert len(found.base_samples_ms) == len(found.head_samples_ms) >= 2
    assert found.change is not None
    assert any("pairs were sampled" in note for note in found.notes)
    assert found.base.fingerprint
    assert no_workers_left()


def test_failure_while_loading_is_inconclusive_without_samples() -> None:
    for factory, loading, why in (("dies_at_once", 60.0, "SIGSEGV"), ("hangs_at_once", 6.0, "no answer within 6 s")):
        found = run(factory, "quick", limits=Limits(loading=loading))
        assert found.verdict is Verdict.INCONCLUSIVE
        assert found.reason.startswith("base: ")
        assert why in found.reason
        assert "while loading" in found.reason or "while starting" in found.reason
        assert (found.change, found.base_samples_ms) == (None, ())


def test_model_that_prints_does_not_disturb_the_protocol_and_another_model_may_be_allowed() -> None:
    found = run("prints", "wider", same_model=False, max_pairs=4)
    assert len(found.head_samples_ms) == 4, found.reason


def test_worker_that_is_killed_from_outside(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    head = side("head", "remembers", env={"KPT_TEST_PID_FILE": str(pid_file)})

    def kill(event: Event) -> None:
        if "turns" in event.message:
            os.kill(int(pid_file.read_text()), signal.SIGKILL)

    found = compare_sides(side("base", "quick"), head, max_seconds=5.0, listen=kill)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "SIGKILL" in found.reason
    assert found.change is None
    assert found.head_samples_ms == ()


@pytest.mark.parametrize(("head", "what"), [("wider", "models"), ("other_inputs", "inputs")])
def test_different_work_is_refused(head: str, what: str) -> None:
    with pytest.raises(NotComparableError, match=f"different {what}") as caught:
        run("quick", head)
    assert caught.value.fix
    assert no_workers_left()


def test_what_the_target_refuses_is_told_with_its_kind_and_trace() -> None:
    with pytest.raises(SideError, match=r"head: .*no 'qiuck'.*did you mean 'quick'") as caught:
        run("quick", "qiuck")
    assert caught.value.kind == "TargetError"
    with pytest.raises(SideError, match="no disk") as caught:
        run("raises_at_once", "quick")
    assert caught.value.label == "base"
    assert "workloads.py" in caught.value.user_traceback


@pytest.mark.parametrize(
    ("mode", "step"),
    [
        ("inference", Step("threads", {"count": 1})),
        ("training", Step("fused_optimizer", {"implementation": "foreach"})),
    ],
)
def test_side_runs_its_plan(mode: str, step: Step, tmp_path: Path) -> None:
    spec = plans.workload(mode=Mode(mode), fingerprint=fingerprint(quick().model()))
    path = tmp_path / "plan.json"
    path.write_text(dumps(plans.plan(step, workload=spec, device=detect("cpu"))))
    sides = side("unmodified", "quick", mode=mode), side("plan", "quick", mode=mode, plan=str(path))
    found = compare_sides(*sides, max_seconds=5.0, max_pairs=2)
    assert (found.base.label, found.head.label) == ("unmodified", "plan")
    assert len(found.head_samples_ms) == 2, found.reason


def test_plan_that_does_not_fit_is_told(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(dumps(plans.plan(device=detect("cpu"))))
    for where, why in (("/nowhere", "no plan"), (str(tmp_path), "for another model")):
        with pytest.raises(SideError, match=why) as caught:
            compare_sides(side("unmodified", "quick"), side("plan", "quick", plan=where))
        assert caught.value.kind == "PlanError"
        assert caught.value.label == "plan"


def test_arguments_that_make_no_sense() -> None:
    with pytest.raises(KptError, match="target or a command"):
        Side("base")
    with pytest.raises(KptError, match="mode"):
        side("base", "quick", mode="serving")
    with pytest.raises(KptError, match="max_slowdown"):
        compare_sides(side("base", "quick"), side("head", "quick"), max_slowdown=0.0)
    with pytest.raises(KptError, match="max_seconds"):
        compare_sides(side("base", "quick"), side("head", "quick"), max_seconds=0.0)
    with pytest.raises(KptError, match="the other a command"):
        compare_sides(side("base", "quick"), Side("head", command=("true",)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_run_ends_its_workers(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(
        textwrap.dedent(f"""
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from kernel_pytorch.guard.compare import InterruptedComparison, compare_sides
        from kernel_pytorch.guard.side_by_side import Side
        try:
            compare_sides(
                Side("base", {f"{TARGETS}:quick"!r}), Side("head", {f"{TARGETS}:hangs"!r}), max_seconds=600.0,
                listen=lambda event: print(event.message, flush=True),
            )
        except InterruptedComparison as stop:
            found = stop.comparison
            print("kept", len(found.head_samples_ms), found.verdict, found.reason, flush=True)
        """)
    )
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as driver:
        assert driver.stdout is not None
        for line in driver.stdout:
            if "turns" in line:
                break
        workers = psutil.Process(driver.pid).children(recursive=True)
        assert len(workers) >= 2
        time.sleep(2.0)  # samples, and then the hang
        driver.send_signal(number)
        rest = driver.stdout.read()
        driver.wait(30)
        _, alive = psutil.wait_procs(workers, timeout=10)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    if number != signal.SIGKILL:
        assert rest.startswith("kept ")
        assert "INCONCLUSIVE interrupted" in rest
