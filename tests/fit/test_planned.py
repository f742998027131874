"""What the compiler is asked for a plan's memory; its answers are made up here (tests/tpu has real ones)."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from kernel_pytorch import Workload
from kernel_pytorch.backends.tpu.topology import Topology
from kernel_pytorch.core.types import Candidate, DeviceSpec, Mode, Step, TensorSignature, WorkloadSpec
from kernel_pytorch.errors import KptError
from kernel_pytorch.fit import planned
from kernel_pytorch.fit.build import Build
from kernel_pytorch.fit.outcome import Fit, How, ModuleBytes

DEVICE = DeviceSpec("tpu", "TPU v5p", "v5p", 0, 1, (), {}, 0.0, {})
CAST = Step("precision_policy", {"to": "bfloat16", "how": "pure_bf16"})
COMPILE = Step("compile", {"backend": "tpu"})
SPEC = WorkloadSpec(
    name="net",
    fingerprint="f",
    mode=Mode.INFERENCE,
    signatures={
        "short": (TensorSignature((2, 8), "float32"),),
        "long": (TensorSignature((2, 64), "float32"),),
        "middle": (TensorSignature((2, 16), "float32"),),
    },
    weights={},
    parameters=0,
    parameter_bytes=0,
    buffer_bytes=0,
    dtypes=(),
    modules={},
    blocks={},
    operators={},
)
WORKLOAD = Workload(model=lambda: nn.Linear(8, 8), inputs=lambda: torch.zeros(2, 8))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Build, Topology, float]]:
    """What the compiler was asked."""
    seen: list[tuple[Build, Topology, float]] = []

    def fit(build: Build, topology: Topology, *, timeout_s: float) -> Fit:
        seen.append((build, topology, timeout_s))
        if any(s.transform == "splash_attention" for s in build.candidate.steps):
            raise KptError("no such kernel", fix="leave it out")
        modules = tuple(ModuleBytes(f"m{i}", 100 - i, 1) for i in range(20))
        return Fit("net", "tpu", topology.name, How.COMPILED, build.mode, 2, fits=True, peak_bytes=7, modules=modules)

    monkeypatch.setattr(planned, "fit_tpu", fit)
    return seen


def test_the_largest_case_is_asked_about_for_a_chip_of_the_plans_generation(asked) -> None:
    (told,) = planned.memory_of(WORKLOAD, SPEC, DEVICE, Candidate(), timeout_s=9.0)
    build, topology, timeout_s = asked[0]
    assert (build.case, topology.name, timeout_s) == ("long", "v5p:1", 9.0)
    assert (told.case, told.place, told.fits, told.peak_bytes) == ("long", "v5p:1", True, 7)
    assert [m.module for m in told.modules] == [f"m{i}" for i in range(10)]


def test_an_emulated_device_is_asked_about_as_one_v5e_chip(asked) -> None:
    planned.memory_of(WORKLOAD, SPEC, replace(DEVICE, arch="emulated"), Candidate(), timeout_s=9.0)
    assert asked[0][1].name == "v5e:1"


def test_a_slice_that_is_named_is_asked_about_whatever_the_device_is(asked) -> None:
    for device in (DEVICE, replace(DEVICE, vendor="cpu", arch="x86_64")):
        (told,) = planned.memory_of(WORKLOAD, SPEC, device, Candidate(), topology="v6e:2x2", timeout_s=9.0)
        assert (asked[-1][1].name, told.place) == ("v6e:2x2", "v6e:2x2")
    with pytest.raises(KptError, match="valid ones of v6e"):
        planned.memory_of(WORKLOAD, SPEC, DEVICE, Candidate(), topology="v6e:3x3", timeout_s=9.0)


def test_steps_that_say_how_to_compile_are_left_out_for_the_whole_step_is_compiled(asked) -> None:
    assert len(planned.memory_of(WORKLOAD, SPEC, DEVICE, Candidate((COMPILE,)), timeout_s=9.0)) == 1
    asked.clear()
    told = planned.memory_of(WORKLOAD, SPEC, DEVICE, Candidate((CAST, COMPILE)), timeout_s=9.0)
    assert [build.candidate.steps for build, _, _ in asked] == [(), (CAST,)]
    assert [str(m.whose) for m in told] == ["unmodified", "chosen"]


def test_what_the_compiler_refuses_is_told_with_the_fix(asked) -> None:
    _, told = planned.memory_of(WORKLOAD, SPEC, DEVICE, Candidate((Step("splash_attention"),)), timeout_s=9.0)
    assert (told.fits, told.peak_bytes, told.reason) == (None, 0, "no such kernel; leave it out")


def test_a_workload_that_cannot_travel_is_told_and_one_of_a_target_is_loaded_again(asked) -> None:
    lock = threading.Lock()
    stuck = replace(WORKLOAD, inputs=lambda: (lock, torch.zeros(2, 8)))
    (told,) = planned.memory_of(stuck, SPEC, DEVICE, Candidate((CAST,)), timeout_s=9.0)
    assert told.fits is None
    assert told.reason.startswith("the workload cannot be sent to another process: cannot pickle")
    assert asked == []
    planned.memory_of(replace(stuck, target="mine.py:net"), SPEC, DEVICE, Candidate(), timeout_s=9.0)
    assert asked[0][0].target == "mine.py:net"
