"""A plan's check: stale, wrong, slow, lost, undecided, and stamped anew."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from kernel_pytorch.core.types import Status, Verdict
from kernel_pytorch.core.workload import Workload
from kernel_pytorch.errors import KptError, PlanError
from kernel_pytorch.guard import check
from kernel_pytorch.guard.check import InterruptedCheck, check_plan, refresh_plan
from kernel_pytorch.guard.findings import Findings
from kernel_pytorch.guard.plan_trial import Seen, read_answer, read_samples
from kernel_pytorch.guard.stale import differences, same_code, stamp
from kernel_pytorch.hardware import detect
from kernel_pytorch.plan.schema import trial_dumps
from kernel_pytorch.validation.regression import judge_pairs
from tests.unit.plans import device, plan, trial


def test_a_plan_of_this_software_and_device_is_fresh():
    here = detect()
    made = replace(plan(), device=here)
    assert differences(made, here) == ()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"software": {"torch": "2.12.0", "python": "3.11"}}, ("torch 2.12.0 -> 2.13.0",)),
        ({"software": {"torch": "2.13.0", "python": "3.11", "triton": "3.4"}}, ("triton 3.4 -> none",)),
        ({"software": {"torch": "2.13.0"}}, ("python none -> 3.11",)),
        ({"software": {"torch": "2.13.0", "python": "3.11", "os": "Linux 5"}}, ()),
        ({"num_devices": 4}, ("device cpu-x86_64-avx512_bf16-4 -> cpu-x86_64-avx512_bf16-2",)),
    ],
)
def test_what_differs_is_named(change, told):
    import kernel_pytorch

    made = plan(device=device(**change), package_version=kernel_pytorch.__version__)
    assert differences(made, device()) == told


def test_another_version_of_this_package_is_told():
    assert differences(plan(package_version="0.0.1"), device())[0].startswith("kernel_pytorch 0.0.1 -> ")


def test_another_architecture_cannot_be_validated_here():
    assert same_code(plan(), device(num_devices=1))
    assert not same_code(plan(), device(arch="aarch64"))


def test_stamps_are_kept_in_order_and_so_is_the_evidence():
    old = plan(device=device(software={"torch": "2.12.0"}))
    fresh = trial(*old.candidate.steps, phase="confirm", ratio=1.9)
    middle = device(software={"torch": "2.12.1"})
    once = stamp(old, fresh, middle)
    twice = stamp(once, trial(*old.candidate.steps, phase="confirm", ratio=1.8), device(software={"torch": "2.13.0"}))
    lines = [n for n in twice.chosen.notes if n.startswith("validated again ")]
    assert ["torch 2.12.0 -> 2.12.1" in lines[0], "torch 2.12.1 -> 2.13.0" in lines[1]] == [True, True]
    assert len(lines) == 2
    assert "2.00x" in lines[0]
    assert "1.90x" in lines[0]
    assert twice.evidence[: len(old.evidence)] == old.evidence
    assert [t.measurement.ratio.value for t in twice.evidence[len(old.evidence) :]] == [1.9, 1.8]
    assert twice.device.software == {"torch": "2.13.0"}
    assert twice.created == old.created


# What a check says of what it has seen; nothing is run or timed here.


def said_by(monkeypatch, made, runs, *, refresh=False, **options):
    """Return the comparison of a plan whose runs, in their order, are each (status or error, base ms, head ms)."""
    queue = list(runs)

    def run(asked, workload, scratch):
        status, base, head = queue.pop(0)
        Path(asked.samples).write_text("".join(f"[{a}, {b}]\n" for a, b in zip(base, head, strict=True)))
        if isinstance(status, BaseException):
            raise status
        if isinstance(status, str):
            return status
        tried = replace(made.chosen, status=status.status, reason=status.reason, numerics=status.numerics)
        if status.status is not Status.OK:
            return Seen(replace(tried, measurement=None))
        owed = [ms / asked.owed for ms in base]
        return Seen(tried, judge_pairs(owed, head, max_slowdown=asked.max_slowdown), {}, status.layers_ms)

    monkeypatch.setattr(check, "_run", run)
    try:
        workload = Workload(model=list, inputs=list, target="x.py:y")
        if refresh:
            return refresh_plan(made, workload, **options)
        return check_plan(made, Path("plan"), workload, **options)
    finally:
        assert not queue, "a run that was expected did not take place"


@pytest.fixture
def made():
    import kernel_pytorch

    return plan(device=detect(), package_version=kernel_pytorch.__version__)  # 2.00x (1.90 to 2.10)


OK = trial()


def pairs(factor: float, n: int = 60, noise: float = 0.002) -> tuple[list[float], list[float]]:
    base = [10.0 * (1 + noise * ((i * 5) % 7 - 3)) for i in range(n)]
    return base, [factor * ms * (1 + noise * ((i * 3) % 5 - 2)) for i, ms in enumerate(base)]


@pytest.mark.parametrize(("factor", "verdict"), [(0.5, Verdict.PASS), (0.8, Verdict.FAIL), (1.2, Verdict.FAIL)])
def test_only_a_plan_that_passes_is_stamped_anew(monkeypatch, made, factor, verdict):
    old = replace(made, device=device(software={**detect().software, "torch": "1.13.0"}))
    old = replace(old, device=replace(detect(), software=old.device.software))
    runs = [(OK, *pairs(factor, n)) for n in ((60,) if verdict is Verdict.PASS else (60, 40, 40, 40))]
    found, fresh = said_by(monkeypatch, old, runs, refresh=True)
    assert found.verdict is verdict
    assert found.name == f"{old.workload.name} (plan)"
    if verdict is Verdict.PASS:
        assert fresh.device.software["torch"] == detect().software["torch"]
        assert "torch 1.13.0 -> " in fresh.chosen.notes[-1]
    else:
        assert fresh is None


def test_a_plan_that_keeps_its_speed_passes_and_tells_what_is_left(monkeypatch, made):
    found = said_by(monkeypatch, made, [(OK, *pairs(0.5))])
    assert found.verdict is Verdict.PASS
    assert found.reason.startswith("right, and 2.00x (")
    assert found.change.value == pytest.approx(0.5, rel=0.01)
    assert found.notes[0] == "100 % of the planned speed-up of 2.00x (1.90 to 2.10) is left"
    assert found.culprits == ()
    assert len(found.head_samples_ms) == 60


def test_a_speed_up_that_is_lost_fails_though_the_plan_is_faster_than_the_model(monkeypatch, made):
    lost = replace(OK, layers_ms={"0": (1.0, 0.9)})  # planned: 1.0 to 0.5 ms
    found = said_by(monkeypatch, made, [(lost, *pairs(0.7)), *[(OK, *pairs(0.7))] * 3])
    assert found.verdict is Verdict.FAIL
    assert found.reason.startswith("the planned speed-up is lost: 2.00x was planned, now 1.43x (")
    assert found.reason.endswith("90 % had to be kept; confirmed by 1.43x in 3 fresh processes")
    assert found.change.high < 1.0
    assert found.culprits[0].what == "0 was 2.00x as fast as unmodified when it was planned, is 1.11x now"
    assert len(found.head_samples_ms) == 240


@pytest.mark.parametrize(("keep", "verdict"), [(0.7, Verdict.PASS), (0.0, Verdict.PASS), (1.0, Verdict.FAIL)])
def test_how_much_must_be_kept_is_the_users_choice(monkeypatch, made, keep, verdict):
    runs = [(OK, *pairs(0.7))] * (4 if verdict is Verdict.FAIL else 1)
    assert said_by(monkeypatch, made, runs, keep=keep).verdict is verdict


def test_a_small_speed_up_owes_at_least_the_unmodified_models_time(monkeypatch, made):
    small = replace(made, chosen=trial(*made.candidate.steps, phase="confirm", ratio=1.04))
    assert said_by(monkeypatch, small, [(OK, *pairs(1.0))]).verdict is Verdict.PASS
    found = said_by(monkeypatch, small, [(OK, *pairs(1.1))] * 4)
    assert found.verdict is Verdict.FAIL
    assert found.reason.startswith("the plan is slower than the unmodified model: 0.91x (")


def test_a_process_that_is_slow_for_its_own_luck_is_no_regression(monkeypatch, made):
    found = said_by(monkeypatch, made, [(OK, *pairs(0.7)), *[(OK, *pairs(0.5))] * 2])
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "slower in one process" in found.reason
    assert found.reason.endswith("which others do not prove (2.00x in 2 fresh processes)")
    assert found.culprits == ()
    assert len(found.head_samples_ms) == 180


def test_processes_that_differ_by_as_much_as_the_plan_is_slow_prove_nothing(monkeypatch, made):
    """The first fresh process is slow too; over all eight, what they owe is within their own scatter."""
    owed = 0.9 * 1.9
    luck = [(OK, *pairs(slow / owed, 40)) for slow in (1.06, 0.99, 1.05, 0.98, 1.06, 0.99, 1.04, 0.99)]
    found = said_by(monkeypatch, made, [(OK, *pairs(0.7)), *luck])
    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.reason.endswith("in 8 fresh processes)")


def test_fresh_processes_are_told_of_and_take_as_many_pairs_as_they_need(monkeypatch, made):
    told, asked = [], []
    monkeypatch.setattr(check, "replace", lambda one, **new: asked.append(new.get("max_pairs")) or replace(one, **new))
    said_by(monkeypatch, made, [(OK, *pairs(0.7)), *[(OK, *pairs(0.7, 12))] * 3], listen=told.append)
    assert [event.message for event in told[1:]] == [
        "slower: sampling again in fresh processes",
        "1.43x in 2 fresh processes",
        "1.43x in 3 fresh processes",
    ]
    assert [pairs for pairs in asked if pairs] == [40]


def test_a_crash_in_the_second_process_confirms_nothing(monkeypatch, made):
    found = said_by(monkeypatch, made, [(OK, *pairs(0.7)), (OK, *pairs(0.7)), ("died by signal 9", [], [])])
    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.reason.endswith("which a fresh process could not confirm: died by signal 9")


def test_too_few_pairs_do_not_decide_and_say_what_is_open(monkeypatch, made):
    found = said_by(monkeypatch, made, [(OK, *pairs(0.56, n=12, noise=0.08))])
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "do not decide whether it is 1.71x, 90 % of what was planned" in found.reason


def test_a_process_that_ended_is_undecided_with_what_it_had_sampled(monkeypatch, made):
    found = said_by(monkeypatch, made, [("the process ended (timeout): no answer", *pairs(0.5, n=6))])
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "timeout" in found.reason
    assert len(found.head_samples_ms) == 6
    assert found.change is not None
    assert found.notes == ("6 pairs were sampled before",)


def test_wrong_numbers_name_the_layer_and_are_not_timed(monkeypatch, made):
    report = replace(OK.numerics, diverged_at="encoder.layer.3")
    wrong = replace(OK, status=Status.WRONG, reason="precision: output[0]: error 0.1", numerics=report)
    found = said_by(monkeypatch, made, [(wrong, [], [])])
    assert found.verdict is Verdict.WRONG
    assert found.reason.endswith("precision: output[0]: error 0.1; first parts at encoder.layer.3")
    assert found.change is None


def test_a_plan_that_no_longer_runs_fails_and_one_without_memory_is_undecided(monkeypatch, made):
    broken = replace(OK, status=Status.FAILED, reason="RuntimeError: no such kernel")
    found = said_by(monkeypatch, made, [(broken, [], [])])
    assert (found.verdict, found.reason) == (Verdict.FAIL, "the plan no longer runs: RuntimeError: no such kernel")
    full = replace(OK, status=Status.OOM, reason="OutOfMemoryError")
    assert said_by(monkeypatch, made, [(full, [], [])]).verdict is Verdict.INCONCLUSIVE


def test_memory_that_grew_is_told(made):
    now = replace(made.chosen.measurement, peak_bytes=3 << 20)  # planned 1 MiB, unmodified 2 MiB
    found = Findings(made, detect(), 0.03, 0.9, "x", "", 0.0).judged(
        Seen(replace(OK, measurement=now), judge_pairs(*pairs(0.9))), pairs(0.5), 1.71
    )
    told = [note for note in found.notes if note.startswith("peak memory")]
    assert told == [
        "peak memory is 3.0 MiB, 200 % more than when it was planned (1.0 MiB)",
        "peak memory is 3.0 MiB, 50 % more than the unmodified model's (2.0 MiB)",
    ]


def test_an_interruption_brings_what_was_sampled(monkeypatch, made):
    with pytest.raises(InterruptedCheck) as caught:
        said_by(monkeypatch, made, [(KeyboardInterrupt(), *pairs(0.5, n=8))])
    kept = caught.value.comparison
    assert (kept.verdict, kept.reason, len(kept.base_samples_ms)) == (Verdict.INCONCLUSIVE, "interrupted", 8)
    with pytest.raises(InterruptedCheck) as caught:
        said_by(monkeypatch, made, [(OK, *pairs(0.7)), (OK, *pairs(0.7)), (KeyboardInterrupt(), *pairs(0.5, n=8))])
    assert len(caught.value.comparison.base_samples_ms) == 60 + 60 + 8


def test_a_share_beyond_one_is_refused(made):
    with pytest.raises(KptError, match="keep must be between 0 and 1, got 90"):
        check_plan(made, Path("plan"), Workload(model=list, inputs=list), keep=90)


def test_requests_and_answers_travel(made, tmp_path):
    judged = judge_pairs(*pairs(0.5))
    seen = Seen(replace(made.chosen, notes=()), judged, {"clock_mhz": 1.0}, {"0": (1.0, 0.5)})
    plain = {"judgement": asdict(judged), "telemetry": {"clock_mhz": 1.0}, "layers_ms": {"0": [1.0, 0.5]}}
    assert read_answer(json.dumps({"trial": trial_dumps(seen.trial), **plain})) == seen
    told = {"kind": "PlanError", "message": "another model", "fix": "run it", "trace": ""}
    with pytest.raises(PlanError, match="another model") as caught:
        read_answer(json.dumps({"refused": told}))
    assert caught.value.fix == "run it"
    (tmp_path / "torn.jsonl").write_text("[1.0, 2.0]\n[3.0, 4.0]\n[5.0")
    assert read_samples(tmp_path / "torn.jsonl") == ((1.0, 3.0), (2.0, 4.0))
    assert read_samples(tmp_path / "nothing") == ((), ())
