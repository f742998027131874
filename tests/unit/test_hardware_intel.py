"""Facts of Intel GPUs, with the answers of `torch.xpu` planted: nobody has run this on one."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch

from kernel_pytorch.backends import accelerator, manager_for
from kernel_pytorch.backends.intel.manager import IntelHardwareManager
from kernel_pytorch.core.protocols import HardwareManager
from kernel_pytorch.errors import KptError
from kernel_pytorch.hardware import _detect, split_device
from kernel_pytorch.hardware.intel import probe, specs

# sycl_ext_oneapi_device_architecture: intel_gpu_pvc, intel_gpu_acm_g10, intel_gpu_bmg_g21
PVC, ACM_G10, BMG_G21 = 0x030F000700, 0x030DC00800, 0x0500400400


def gpu(architecture, engines, memory_gb, **more):
    return types.SimpleNamespace(
        architecture=architecture,
        gpu_eu_count=engines,
        total_memory=int(memory_gb * 1e9),
        name="a name that decides nothing",
        driver_version="1.6.33578+15",
        has_fp16=True,
        has_fp64=architecture != ACM_G10,
        has_bfloat16_conversions=True,
        has_subgroup_matrix_multiply_accumulate=True,
        has_subgroup_matrix_multiply_accumulate_tensor_float32=architecture == PVC,
        **more,
    )


MAX1550 = gpu(PVC, 1024, 137)
MAX1550_TILE = gpu(PVC, 512, 68.7, last_level_cache_size=204 << 20)
MAX1100 = gpu(PVC, 448, 51.5)
A770 = gpu(ACM_G10, 512, 16.2)
A770_8GB = gpu(ACM_G10, 512, 8.1)
B580 = gpu(BMG_G21, 160, 12.2)
B570 = gpu(BMG_G21, 144, 10.2)


@pytest.fixture
def machine(monkeypatch):
    """Plants the GPUs of a machine with an XPU build of torch."""
    _detect.cache_clear()

    def plant(*gpus):
        monkeypatch.setattr(torch.version, "xpu", "20250101", raising=False)
        monkeypatch.setattr(torch.xpu, "device_count", lambda: len(gpus))
        monkeypatch.setattr(
            torch.xpu, "get_device_properties", lambda device: gpus[device if isinstance(device, int) else device.index]
        )

    yield plant
    _detect.cache_clear()


@pytest.mark.parametrize(
    ("architecture", "arch"), [(PVC, "xe12.60"), (ACM_G10, "xe12.55"), (BMG_G21, "xe20.1"), (0, "xe"), (-1, "xe")]
)
def test_the_architecture_number_is_decoded(architecture, arch):
    assert specs.arch_of(architecture) == arch


@pytest.mark.parametrize(
    ("one", "arch", "float16_tflops", "float32_tflops", "terabytes_per_s"),
    [
        (MAX1550, "xe12.60", 838.9, 52.4, 3.2768),
        (MAX1550_TILE, "xe12.60", 419.45, 26.2, 1.6384),
        (MAX1100, "xe12.60", 367.0, 22.9, 1.2288),
        (A770, "xe12.55", 157.3, 19.7, 0.56),
        (A770_8GB, "xe12.55", 157.3, 19.7, 0.512),
        (B580, "xe20.1", 116.7, 14.6, 0.456),
        (B570, "xe20.1", 105.0, 13.14, 0.38),
    ],
)
def test_rates_are_those_of_the_documents(machine, one, arch, float16_tflops, float32_tflops, terabytes_per_s):
    machine(one)
    spec = probe.detect(0)
    assert (spec.vendor, spec.arch, spec.num_devices) == ("intel", arch, 1)
    assert spec.peak_flops["float16"] == pytest.approx(float16_tflops * 1e12, rel=2e-3)
    assert spec.peak_flops["float32"] == pytest.approx(float32_tflops * 1e12, rel=2e-3)
    assert spec.bandwidth_bytes_per_s == pytest.approx(terabytes_per_s * 1e12)
    assert set(spec.sources) == {*(f"peak_flops.{d}" for d in spec.peak_flops), "bandwidth_bytes_per_s"}
    assert spec.software["driver"] == "1.6.33578+15"
    assert spec.software["oneapi"] == "20250101"
    assert not spec.verified, "nobody has run the contract suite on one"


def test_features_are_what_the_driver_tells(machine):
    machine(MAX1550)
    assert {"bf16", "fp16", "fp64", "tf32", "triton", "xmx", "xpu"} <= set(probe.detect(0).features)
    machine(A770)
    assert not {"fp64", "tf32", "cuda", "cuda_graphs", "fp8"} & set(probe.detect(0).features)
    plain = types.SimpleNamespace(name="", total_memory=8 << 30)
    machine(plain)
    spec = probe.detect(0)
    assert not {"bf16", "xmx", "fp16"} & set(spec.features), "an older torch tells nothing: nothing is claimed"
    assert spec.arch == "xe"
    assert dict(spec.peak_flops) == {}
    assert "driver" not in spec.software


@pytest.mark.parametrize("arch", sorted(specs._REFERENCES))
def test_every_reference_is_consistent(arch):
    reference = specs._REFERENCES[arch]
    rates = reference.tflops
    assert rates["float32"] < rates["float16"] == rates["bfloat16"]
    assert rates["int8"] == pytest.approx(2 * rates["float16"], rel=1e-2)
    least = [memory for memory, _ in reference.bandwidth]
    assert least == sorted(least, reverse=True)
    assert least[-1] == 0
    more = specs.peak_rates(arch, vector_engines=10**5, memory_bytes=10**12)
    assert more.flops == pytest.approx({dtype: rate * 1e12 for dtype, rate in rates.items()}), "never above the product"


def test_xpu_is_an_intel_gpu(machine):
    machine(MAX1550_TILE, MAX1550_TILE, B580)
    assert split_device("auto") == split_device("xpu") == split_device("intel:0") == ("intel", 0)
    assert [probe.detect(i).num_devices for i in range(3)] == [2, 2, 1]
    assert probe.detect(0).key == "intel-xe12.60-2"
    assert probe.cache_bytes() == 204 << 20
    with pytest.raises(KptError, match=r"only 3 Intel GPU\(s\)") as caught:
        split_device("xpu:3")
    assert "xpu:0 to xpu:2" in caught.value.fix
    machine()
    with pytest.raises(KptError, match="no Intel GPU is visible"):
        split_device("xpu")


def test_without_an_xpu_build_there_is_no_intel_gpu():
    if getattr(torch.version, "xpu", None) is not None:
        pytest.skip("this torch is an XPU build")
    with pytest.raises(KptError, match="not supported by this build") as caught:
        split_device("xpu")
    assert caught.value.fix.startswith("pip install")


def test_its_manager_is_a_manager_and_says_that_it_is_unverified(machine):
    machine(B580)
    manager = manager_for("xpu")
    assert isinstance(manager, IntelHardwareManager)
    assert isinstance(manager, HardwareManager)
    assert manager.verified is manager.spec.verified is False
    assert manager.telemetry() == {}


class FakeAccelerator:
    """A torch accelerator module whose events say 7 ms and whose allocator counts what the work says."""

    def __init__(self):
        self.log = []
        self.held, self.peak = 1000, 5000

    def device(self, device):
        self.log.append(f"device {device}")
        return contextlib.nullcontext()

    def Event(self, *, enable_timing):
        assert enable_timing
        return types.SimpleNamespace(
            record=lambda: self.log.append("record"), elapsed_time=lambda end: 7.0 if end else None
        )

    def synchronize(self, device=None):
        self.log.append("synchronize")

    def reset_peak_memory_stats(self, device):
        self.peak = self.held

    def memory_allocated(self, device):
        return self.held

    def max_memory_allocated(self, device):
        return self.peak


def test_time_is_from_an_idle_device_to_an_idle_device():
    api = FakeAccelerator()
    device = torch.device("cpu")
    flush = torch.ones(4)
    time_ms = accelerator.time_ms(api, device, lambda: api.log.append("work"), flush)
    assert time_ms == 7.0
    assert api.log == ["device cpu", "synchronize", "record", "work", "record", "synchronize"]
    assert float(flush.sum()) == 0.0


def test_peak_is_above_what_was_held():
    api = FakeAccelerator()

    def work():
        api.peak = 4200

    assert accelerator.peak_bytes(api, torch.device("cpu"), work) == 3200


def test_a_cache_is_flushed_by_twice_its_size():
    assert accelerator.cache_flush(torch.device("cpu"), 100 << 20).nbytes == 200 << 20
    assert accelerator.cache_flush(torch.device("cpu"), 0).nbytes == 64 << 20
