"""Facts of NVIDIA GPUs, with torch's answers planted: no GPU is needed to read a data sheet."""

from __future__ import annotations

import types

import pytest
import torch

from kernel_pytorch.backends.nvidia import telemetry
from kernel_pytorch.errors import KptError
from kernel_pytorch.hardware import split_device
from kernel_pytorch.hardware.nvidia import probe, specs


def gpu(major, minor, multiprocessors, memory_gb, **more):
    return types.SimpleNamespace(
        major=major,
        minor=minor,
        multi_processor_count=multiprocessors,
        total_memory=int(memory_gb * 1e9),
        name="a name that decides nothing",
        **more,
    )


H100 = gpu(9, 0, 132, 85, memory_clock_rate=2_619_000, memory_bus_width=5120, clock_rate=1_980_000)
H200 = gpu(9, 0, 132, 150)
L4 = gpu(8, 9, 58, 24, clock_rate=2_040_000, memory_clock_rate=6_251_000, memory_bus_width=192)
B200 = gpu(10, 0, 148, 190)
UNKNOWN = gpu(13, 7, 200, 300)


@pytest.fixture
def machine(monkeypatch):
    """Plants the GPUs of a machine."""

    def plant(*gpus):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])

    return plant


def test_hopper_by_capability(machine):
    machine(H100, H100, L4)
    spec = probe.detect(0)
    assert (spec.vendor, spec.arch, spec.num_devices) == ("nvidia", "sm_90", 2)
    assert spec.key == "nvidia-sm_90-2"
    assert spec.peak_flops["bfloat16"] == pytest.approx(989.5e12)
    assert spec.peak_flops["float8_e4m3fn"] == pytest.approx(1979e12)
    assert spec.bandwidth_bytes_per_s == pytest.approx(3.35e12, rel=0.01)
    assert {"cuda", "bf16", "fp16", "tf32", "fp8", "cuda_graphs", "wgmma"} <= set(spec.features)
    assert not {"mxfp8", "nvfp4"} & set(spec.features)
    assert "H100" in spec.sources["peak_flops.bfloat16"]
    assert "driver" in spec.sources["bandwidth_bytes_per_s"]
    assert spec.software["cuda"] == "13.0"


def test_memory_tells_h200_from_h100_where_the_driver_does_not_tell_its_bandwidth(machine):
    machine(H200)
    assert probe.detect(0).bandwidth_bytes_per_s == 4.8e12


def test_rates_scale_by_multiprocessors_and_clock(machine):
    machine(H100, L4)
    spec = probe.detect(1)
    # The L4's data sheet says 121 dense FP16, 242 FP8 and 30.3 FP32 TFLOP/s, and 300 GB/s.
    assert spec.peak_flops["float16"] == pytest.approx(121e12, rel=0.02)
    assert spec.peak_flops["float8_e4m3fn"] == pytest.approx(242e12, rel=0.02)
    assert spec.peak_flops["float32"] == pytest.approx(30.3e12, rel=0.02)
    assert spec.bandwidth_bytes_per_s == pytest.approx(300e9, rel=0.01)
    assert spec.num_devices == 1


def test_blackwell_has_the_narrow_formats(machine):
    machine(B200)
    spec = probe.detect(0)
    assert {"mxfp8", "nvfp4", "tcgen05"} <= set(spec.features)
    assert spec.peak_flops["nvfp4"] > spec.peak_flops["float8_e4m3fn"] > spec.peak_flops["bfloat16"]


def test_an_unknown_arch_has_no_rates_and_claims_none(machine):
    machine(UNKNOWN)
    spec = probe.detect(0)
    assert spec.arch == "sm_137"
    assert dict(spec.peak_flops) == {}
    assert spec.bandwidth_bytes_per_s == 0.0
    assert dict(spec.sources) == {}
    assert not spec.verified


@pytest.mark.parametrize("capability", sorted(specs._REFERENCES))
def test_every_reference_is_consistent(capability):
    reference = specs._REFERENCES[capability]
    rates = reference.tflops
    assert rates["float64"] <= rates["float32"] <= rates.get("tf32", rates["float16"]) <= rates["float16"]
    assert rates.get("bfloat16", rates["float16"]) == rates["float16"]
    assert rates.get("float8_e4m3fn", 2 * rates["float16"]) == pytest.approx(2 * rates["float16"], rel=0.02)
    assert ("bf16" in specs.features(capability)) == ("bfloat16" in rates)
    assert ("tf32" in specs.features(capability)) == ("tf32" in rates)
    assert ("fp8" in specs.features(capability)) == ("float8_e4m3fn" in rates)
    assert ("nvfp4" in specs.features(capability)) == ("nvfp4" in rates)
    least = [memory for memory, _ in reference.bandwidth]
    assert least == sorted(least, reverse=True)
    assert least[-1] == 0
    own = specs.peak_rates(
        capability,
        multiprocessors=reference.multiprocessors,
        clock_khz=reference.clock_khz,
        memory_bytes=10**12,
        memory_clock_khz=0,
        memory_bus_bits=0,
    )
    assert own.flops == pytest.approx({dtype: rate * 1e12 for dtype, rate in rates.items()})


def test_a_rocm_build_is_not_an_nvidia_gpu(machine, monkeypatch):
    machine(H100)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(KptError, match="no CUDA support") as caught:
        split_device("cuda")
    assert caught.value.fix.startswith("pip install")


def test_several_devices_and_one_that_is_not_there(machine):
    machine(H100, L4)
    assert split_device("auto") == ("nvidia", 0)
    assert split_device("cuda:1") == split_device("nvidia:1") == ("nvidia", 1)
    with pytest.raises(KptError, match=r"only 2 NVIDIA GPU\(s\)") as caught:
        split_device("cuda:2")
    assert "cuda:0 to cuda:1" in caught.value.fix
    machine()
    with pytest.raises(KptError, match="no NVIDIA GPU is visible"):
        split_device("cuda")


class FakeNvml(types.ModuleType):
    """NVML where one question may be refused."""

    class NVMLError(Exception):
        """As in pynvml."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, *, refuse_all=False):
        super().__init__("pynvml")
        self.asked = ""
        self.refuse_all = refuse_all

    def nvmlInit(self):
        if self.refuse_all:
            raise self.NVMLError

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self.asked = uuid
        return 0

    def nvmlDeviceGetClockInfo(self, handle, which):
        return {1: 1980, 2: 3201}[which]

    def nvmlDeviceGetPowerUsage(self, handle):
        raise self.NVMLError("Insufficient Permissions")

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return 41

    def nvmlDeviceGetUtilizationRates(self, handle):
        return types.SimpleNamespace(gpu=7)

    def nvmlDeviceGetMemoryInfo(self, handle):
        return types.SimpleNamespace(used=1 << 30)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return 4


def test_telemetry_leaves_out_what_nvml_refuses(monkeypatch):
    fake = FakeNvml()
    monkeypatch.setitem(__import__("sys").modules, "pynvml", fake)
    values = telemetry.read("1234")
    assert fake.asked == "GPU-1234"
    assert values == {
        "sm_clock_mhz": 1980.0,
        "memory_clock_mhz": 3201.0,
        "temperature_celsius": 41.0,
        "gpu_busy_percent": 7.0,
        "memory_used_bytes": float(1 << 30),
        "throttle_reasons": 4.0,
    }


def test_telemetry_is_empty_without_nvml(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pynvml", FakeNvml(refuse_all=True))
    assert telemetry.read("1234") == {}
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert telemetry.read("1234") == {}
