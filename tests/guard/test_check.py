"""A plan's check: stale, wrong, slow, lost, undecided, and stamped anew."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kernel_pytorch.guard.stale import differences, same_code, stamp
from kernel_pytorch.hardware import detect
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
