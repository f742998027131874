"""What a search says of a TPU before it tries anything, and who of its processes has the chip."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
import torch._dynamo
from torch import nn

from kernel_pytorch.backends import one_process
from kernel_pytorch.backends.cpu.manager import CpuHardwareManager
from kernel_pytorch.backends.tpu import TPUHardwareManager
from kernel_pytorch.catalog import TRANSFORMS
from kernel_pytorch.cli import main
from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.management import unified_manager
from kernel_pytorch.core.management.unified_manager import UnifiedManager
from kernel_pytorch.core.program import begin, call_counts, clone_model, ship
from kernel_pytorch.core.types import DeviceSpec, Mode, Step, TensorSignature
from kernel_pytorch.core.workload import Call, Workload
from kernel_pytorch.errors import CandidateError, KptError, ModelError
from kernel_pytorch.hardware import detect
from kernel_pytorch.search import jobs, operators
from kernel_pytorch.search.operators import WorkCounter
from kernel_pytorch.search.profile import estimated_shares
from kernel_pytorch.transforms import xla_compile
from kernel_pytorch.transforms.compile import Compile

V5E = DeviceSpec(
    vendor="tpu",
    name="TPU v5e",
    arch="v5e",
    memory_bytes=16 << 30,
    num_devices=1,
    features=("bf16", "int8", "torch_tpu"),
    peak_flops={"bfloat16": 197e12, "int8": 393e12},
    bandwidth_bytes_per_s=819e9,
    software={"runtime": "torch_tpu 0.2.0"},
)


class Alone(CpuHardwareManager):
    """The CPU, as a device that one process at a time can have, and that only its workers may take."""

    one_process = True
    taken: ClassVar[list[str]] = []

    def place(self, tree):
        self.taken.append(type(tree).__name__)
        return super().place(tree)


def tiny():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU())


def rows():
    return torch.ones(4, 8)


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(Alone, "taken", [])
    monkeypatch.setattr(unified_manager, "manager_for", lambda device="auto": Alone())
    return Alone.taken


def test_only_the_tpu_belongs_to_one_process():
    assert one_process(TPUHardwareManager())
    assert not one_process(CpuHardwareManager())


def test_a_search_leaves_such_a_device_to_its_workers(alone):
    config = KernelPyTorchConfig(budget_s=20.0, only=("threads",))
    result = UnifiedManager(config, device="cpu").optimize(Workload(tiny, rows, name="tiny"))
    assert alone == [], "this process never took it"
    assert result.plan.prediction.flops == 2 * 4 * 8 * 8
    assert result.plan.workload.parameters == 72
    assert {t.isolation for t in result.plan.evidence} == {"process"}
    result.model(rows())
    assert alone, "the result's model is on the device, once somebody asks for it"


def test_what_a_worker_refuses_is_raised_here_as_it_was_there(alone):
    def nan():
        model = tiny()
        model[0].weight.data.fill_(float("nan"))
        return model

    with pytest.raises(ModelError, match="NaN or infinite values") as caught:
        UnifiedManager(device="cpu").optimize(Workload(nan, rows))
    assert "example inputs" in caught.value.fix


def test_a_worker_that_dies_in_the_survey_is_told_with_its_signal(alone):
    here = os.getpid()

    def crash():
        if os.getpid() != here:
            os.abort()
        return tiny()

    with pytest.raises(KptError, match=r"cannot be run on cpu: died by signal 6 \(SIGABRT\)"):
        UnifiedManager(device="cpu").optimize(Workload(crash, rows))


def test_jobs_run_on_the_device_that_was_asked_for(monkeypatch):
    asked = []

    def manager_for(device="auto"):
        asked.append(device)
        return CpuHardwareManager()

    monkeypatch.setattr(jobs, "manager_for", manager_for)
    config = KernelPyTorchConfig(budget_s=10.0, isolation="none", only=("threads",))
    with jobs.Jobs(Workload(tiny, rows), config, TRANSFORMS, "cpu:0") as workers:
        workers.survey()
    assert asked == ["cpu:0"]


def test_shares_come_from_operations_and_bytes():
    wide, x = nn.Linear(2048, 2048, bias=False), torch.ones(2048, 2048)
    with torch.no_grad(), WorkCounter() as counter:
        torch.relu(wide(x))
    shares = estimated_shares(counter, V5E)
    assert sum(shares.values()) == pytest.approx(1.0)
    matmul = 2 * 2048**3 / 197e12  # 87 us, more than its bytes take
    relu = 2 * 2048 * 2048 * 4 / 819e9
    assert shares["matmul"] == pytest.approx(matmul / (matmul + relu), rel=1e-3)
    unknown = replace(V5E, arch="emulated", peak_flops={}, bandwidth_bytes_per_s=0.0)
    assert estimated_shares(counter, unknown) == shares, "an emulated one has the rates of v5e"
    assert estimated_shares(WorkCounter(), V5E) == {"overhead": 1.0}


OURS = [t for t in TRANSFORMS if type(t).__module__.startswith("kernel_pytorch.transforms.")]


def test_operations_of_a_device_that_keeps_linear_and_attention_whole_are_counted():
    """TorchTPU's operators, by their formulas: those of the same layers on the CPU."""
    formulas = operators._EXTRA
    x, weight = torch.ones(2, 4, 8), torch.ones(16, 8)
    assert formulas["aten.linear"](x, weight, None) == 2 * 2 * 4 * 8 * 16
    both, none = [True, True, True], [False, True, False]
    assert formulas["aten.linear_backward"](x, torch.ones(2, 4, 16), weight, both) == 2 * (2 * 2 * 4 * 8 * 16)
    assert formulas["aten.linear_backward"](x, torch.ones(2, 4, 16), weight, none) == 2 * 2 * 4 * 8 * 16
    q = torch.ones(1, 2, 4, 8)
    attention = formulas["aten._scaled_dot_product_fused_attention_overrideable"]
    assert attention(q, q, q, None, 0.0, True) == 2 * (2 * 2 * 4 * 4 * 8)


@pytest.mark.parametrize("transform", OURS, ids=lambda t: t.name)
def test_what_is_for_gpus_or_cpus_says_so(transform):
    """On a TPU no step may need CUDA, Triton, Inductor or oneDNN."""
    runs = {"causal_mask", "dtype", "precision_policy", "regional_compile", "compile", "bucketing", "splash_attention"}
    skip = transform.probe(V5E)
    assert (skip is None) == (transform.name in runs)
    assert skip is None or skip.reason


def spec_of(mode, *shapes):
    """Return what `Compile.propose` reads of a workload."""
    cases = {str(i): (TensorSignature(shape, "float32"),) for i, shape in enumerate(shapes)}
    return type("Spec", (), {"mode": mode, "signatures": cases})()


@pytest.mark.parametrize(
    ("shapes", "steps"),
    [
        ([(4, 8)], [{}]),
        ([(4, 8), (6, 8)], [{}, {"buckets": "batch"}]),
        ([(4, 8), (4, 9)], [{}, {"buckets": "batch_sequence"}]),
        ([(n, 8) for n in range(1, 10)], [{"buckets": "batch"}, {}]),
    ],
)
def test_several_shapes_are_compiled_one_by_one_or_by_buckets(shapes, steps):
    proposed = Compile().propose(spec_of(Mode.INFERENCE, *shapes), V5E)
    assert proposed == [Step("compile", {"backend": "tpu"} | extra) for extra in steps]


def test_buckets_are_counted_not_shapes(monkeypatch):
    """Nine shapes are more than torch.compile specialises on; their buckets are five."""
    monkeypatch.setattr(xla_compile, "_BACKENDS", {"cpu": "eager"})
    calls = {str(n): Call((torch.ones(n, 8),)) for n in range(1, 10)}
    model = tiny().eval()
    with pytest.raises(CandidateError, match=r"9 input shapes are more than the 8 .* use buckets=batch"):
        Compile().apply(begin(clone_model(model), Mode.INFERENCE, calls), Step("compile", {"backend": "eager"}))
    step = Step("compile", {"backend": "eager", "buckets": "batch"})
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    shipped = ship(Compile().apply(begin(clone_model(model), Mode.INFERENCE, calls), step), model)
    with torch.no_grad():
        for n in (*range(1, 10), 13, 16):  # 13 rows are no case of the workload
            assert torch.allclose(shipped(torch.ones(n, 8)), model(torch.ones(n, 8)), atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5, "1, 2, 4, 8 and 16 rows"
    assert call_counts(shipped).outside == 0
    assert "round_up" in Compile().source(step)


def test_compile_names_the_backend_of_the_runtime_and_nothing_of_inductors():
    assert Compile().probe(V5E) is None, "a TPU's compiler needs no C++ compiler"
    spec = replace(V5E, features=("bf16", "torch_xla"))
    workload = spec_of(Mode.TRAINING, (4, 8))
    assert Compile().propose(workload, V5E) == [
        Step("compile", {"backend": "tpu", "scope": "loss"}),
        Step("compile", {"backend": "tpu"}),
    ]
    assert Compile().propose(workload, spec)[1] == Step("compile", {"backend": "openxla"})
    source = Compile().source(Step("compile", {"backend": "tpu"}))
    assert "call = torch.compile(call, backend='tpu', dynamic=False)" in source
    assert "call = contiguous_inputs(call)" in source
    assert "torch_xla" not in source, "what PyTorch/XLA needs stays with it"


def test_a_backend_for_another_device_is_refused():
    program = begin(tiny().eval(), Mode.INFERENCE, {"main": Call((rows(),))})
    with pytest.raises(CandidateError, match="on cpu, bucketing is a step of its own"):
        Compile().apply(program, Step("compile", {"buckets": "batch"}))
    with pytest.raises(CandidateError, match="a model on cpu is compiled with no backend but Inductor"):
        Compile().apply(program, Step("compile", {"backend": "tpu"}))


def test_without_a_tpu_the_command_says_so_and_what_answers(monkeypatch, capsys, tmp_path):
    for name in ("KPT_TPU_EMULATE", "KPT_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("kernel_pytorch.hardware.tpu.probe.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in (["detect"], ["predict", "x.py:w"], ["optimize", "x.py:w"]):
        assert main([*command, "--device", "tpu"]) == 2
        said = capsys.readouterr().err.strip()
        assert "no TPU here; fix: `kpt fit TARGET --topology v5e:2x2`" in said
        assert "\n" not in said


def test_a_device_may_be_named():
    assert UnifiedManager(device="cpu").hardware_manager.vendor == "cpu"
    assert UnifiedManager(device=None).hardware_manager.spec == detect("auto")
    with pytest.raises(KptError, match="not supported"):
        UnifiedManager(device="npu")
