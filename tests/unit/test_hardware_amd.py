"""Facts of AMD GPUs, with the answers of torch's ROCm build planted: nobody has run this on one."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from kernel_pytorch.backends import manager_for
from kernel_pytorch.backends.amd import telemetry
from kernel_pytorch.backends.amd.manager import AmdHardwareManager
from kernel_pytorch.core.protocols import HardwareManager
from kernel_pytorch.core.types import DeviceSpec
from kernel_pytorch.errors import KptError
from kernel_pytorch.hardware import _detect, split_device
from kernel_pytorch.hardware.amd import probe, specs


def gpu(target, compute_units, memory_gb, **more):
    return types.SimpleNamespace(
        gcnArchName=target,
        major=9,  # HIP gives AMD GPUs a compute capability too
        minor=0,
        multi_processor_count=compute_units,
        total_memory=int(memory_gb * 1e9),
        name="a name that decides nothing",
        **more,
    )


MI250X = gpu("gfx90a:sramecc+:xnack-", 110, 68.7)
MI300X = gpu("gfx942:sramecc+:xnack-", 304, 206, clock_rate=2_100_000, L2_cache_size=4 << 20)
MI300X_CPX = gpu("gfx942:sramecc+:xnack-", 38, 25.7, clock_rate=2_100_000)
MI325X = gpu("gfx942:sramecc+:xnack-", 304, 274)
MI350X = gpu("gfx950:sramecc+:xnack-", 256, 309, clock_rate=2_200_000)
MI355X = gpu("gfx950:sramecc+:xnack-", 256, 309, clock_rate=2_400_000)
RX7900XTX = gpu("gfx1100", 48, 25.7)
RX7900XT = gpu("gfx1100", 42, 21.4)
UNKNOWN = gpu("gfx1399", 500, 500)


@pytest.fixture
def machine(monkeypatch):
    """Plants the GPUs of a machine with a ROCm build of torch."""
    _detect.cache_clear()

    def plant(*gpus):
        monkeypatch.setattr(torch.version, "hip", "6.4.43483")
        monkeypatch.setattr(torch.version, "cuda", None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))

        def properties(device):
            return gpus[device if isinstance(device, int) else device.index]

        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)

    yield plant
    _detect.cache_clear()


@pytest.mark.parametrize(
    ("one", "arch", "float16_tflops", "float64_tflops", "terabytes_per_s"),
    [
        (MI250X, "gfx90a", 191.5, 47.85, 1.6384),
        (MI300X, "gfx942", 1307.4, 163.4, 5.3),
        (MI325X, "gfx942", 1307.4, 163.4, 6.0),
        (MI350X, "gfx950", 2306.9, 72.05, 8.0),
        (MI355X, "gfx950", 2516.6, 78.6, 8.0),
        (RX7900XTX, "gfx1100", 122.8, 1.92, 0.96),
        (RX7900XT, "gfx1100", 107.45, 1.68, 0.8),
    ],
)
def test_rates_are_those_of_the_data_sheets(machine, one, arch, float16_tflops, float64_tflops, terabytes_per_s):
    machine(one)
    spec = probe.detect(0)
    assert (spec.vendor, spec.arch, spec.num_devices) == ("amd", arch, 1)
    assert spec.peak_flops["float16"] == pytest.approx(float16_tflops * 1e12, rel=1e-3)
    assert spec.peak_flops["float64"] == pytest.approx(float64_tflops * 1e12, rel=1e-3)
    assert spec.bandwidth_bytes_per_s == pytest.approx(terabytes_per_s * 1e12)
    assert set(spec.sources) == {*(f"peak_flops.{d}" for d in spec.peak_flops), "bandwidth_bytes_per_s"}
    assert spec.software["rocm"] == "6.4.43483"
    assert "cuda" not in spec.software
    assert not spec.verified, "nobody has run the contract suite on one"


def test_fp8_is_another_format_on_gfx942_than_on_gfx950(machine):
    machine(MI300X)
    old = probe.detect(0)
    assert "fp8_fnuz" in old.features
    assert not {"fp8", "mxfp8", "mxfp4"} & set(old.features)
    assert "float8_e4m3fn" not in old.peak_flops
    machine(MI355X)
    new = probe.detect(0)
    assert {"fp8", "mxfp8", "mxfp4"} <= set(new.features)
    assert "fp8_fnuz" not in new.features
    assert new.peak_flops["float8_e4m3fn"] == pytest.approx(2 * new.peak_flops["float16"], rel=1e-3)


def test_a_partition_has_its_own_compute_units_and_no_more_than_the_whole_bandwidth(machine):
    machine(*[MI300X_CPX] * 8)
    spec = probe.detect(0)
    assert spec.num_devices == 8
    assert spec.key == "amd-gfx942-8"
    assert spec.peak_flops["bfloat16"] == pytest.approx(1307.4e12 * 38 / 304)
    assert spec.bandwidth_bytes_per_s == 5.3e12


def test_an_unknown_target_has_no_rates_and_claims_little(machine):
    machine(UNKNOWN)
    spec = probe.detect(0)
    assert spec.arch == "gfx1399"
    assert dict(spec.peak_flops) == {}
    assert spec.bandwidth_bytes_per_s == 0.0
    assert not {"bf16", "fp8", "triton", "mfma"} & set(spec.features)


@pytest.mark.parametrize("arch", sorted(specs._REFERENCES))
def test_every_reference_is_consistent(arch):
    reference = specs._REFERENCES[arch]
    rates = reference.tflops
    assert rates["float64"] <= rates["float32"] <= rates["float16"] == rates["bfloat16"]
    assert "bf16" in specs.features(arch)
    assert ("fp8" in specs.features(arch)) == ("float8_e4m3fn" in rates)
    assert ("fp8_fnuz" in specs.features(arch)) == ("float8_e4m3fnuz" in rates)
    assert ("mxfp4" in specs.features(arch)) == ("mxfp4" in rates)
    least = [memory for memory, _ in reference.bandwidth]
    assert least == sorted(least, reverse=True)
    assert least[-1] == 0
    more = specs.peak_rates(arch, compute_units=10**4, clock_khz=10**8, memory_bytes=10**12)
    assert more.flops == pytest.approx({dtype: rate * 1e12 for dtype, rate in rates.items()}), "never above the product"


def test_cuda_is_an_amd_gpu_where_torch_is_a_rocm_build(machine):
    machine(MI300X, MI300X)
    assert split_device("auto") == split_device("cuda") == split_device("amd") == ("amd", 0)
    assert split_device("cuda:1") == ("amd", 1)
    with pytest.raises(KptError, match="no CUDA support"):
        split_device("nvidia")
    with pytest.raises(KptError, match=r"only 2 AMD GPU\(s\)") as caught:
        split_device("cuda:2")
    assert "amd:0 to amd:1" in caught.value.fix
    machine()
    with pytest.raises(KptError, match="no AMD GPU is visible"):
        split_device("cuda")


def test_without_rocm_there_is_no_amd_gpu():
    if torch.version.hip is not None:
        pytest.skip("this torch is a ROCm build")
    with pytest.raises(KptError, match="no ROCm support") as caught:
        split_device("amd")
    assert caught.value.fix.startswith("pip install")


def test_several_kinds_are_counted_apart(machine):
    machine(MI300X, RX7900XTX, MI300X)
    assert [probe.detect(i).num_devices for i in range(3)] == [2, 1, 2]


def test_the_infinity_cache_is_the_last_level(machine):
    machine(MI300X)
    assert probe.cache_bytes() == 256 << 20
    machine(gpu("gfx90a:sramecc+:xnack-", 110, 68.7, L2_cache_size=8 << 20))
    assert probe.cache_bytes() == 8 << 20


class FakeSmi(types.ModuleType):
    """AMD SMI with two GPUs, of which the second is wanted, and answers it does not have."""

    class AmdSmiException(Exception):
        """As in amdsmi."""

    AmdSmiClkType = types.SimpleNamespace(GFX="gfx", MEM="mem")
    AmdSmiTemperatureType = types.SimpleNamespace(HOTSPOT="hot")
    AmdSmiTemperatureMetric = types.SimpleNamespace(CURRENT="now")

    def amdsmi_init(self):
        return None

    def amdsmi_get_processor_handles(self):
        return ["first", "second"]

    def amdsmi_get_gpu_device_bdf(self, handle):
        return {"first": "0000:05:00.0", "second": "0000:C1:00.0"}[handle]

    def amdsmi_get_clock_info(self, handle, kind):
        assert handle == "second"
        return {"clk": {"gfx": 2100, "mem": "N/A"}[kind]}

    def amdsmi_get_power_info(self, handle):
        return {"current_socket_power": "N/A", "average_socket_power": 310}

    def amdsmi_get_temp_metric(self, handle, sensor, metric):
        raise self.AmdSmiException("not permitted")

    def amdsmi_get_gpu_activity(self, handle):
        return {"gfx_activity": 12}

    def amdsmi_get_gpu_vram_usage(self, handle):
        return {"vram_total": 1000, "vram_used": 3}


def test_telemetry_is_of_this_gpu_and_leaves_out_what_is_not_told(machine, monkeypatch):
    machine(gpu("gfx942", 304, 206, pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0))
    monkeypatch.setitem(sys.modules, "amdsmi", FakeSmi("amdsmi"))
    telemetry._open.cache_clear()
    assert AmdHardwareManager(0).telemetry() == {
        "sm_clock_mhz": 2100.0,
        "power_watts": 310.0,
        "gpu_busy_percent": 12.0,
        "memory_used_bytes": 3.0 * (1 << 20),
    }
    machine(gpu("gfx942", 304, 206))
    assert AmdHardwareManager(0).telemetry() == {}, "another GPU's telemetry is none"
    telemetry._open.cache_clear()


def test_telemetry_is_empty_without_amd_smi(monkeypatch):
    monkeypatch.setitem(sys.modules, "amdsmi", None)
    telemetry._open.cache_clear()
    assert telemetry.read(0, 1, 2) == {}
    telemetry._open.cache_clear()


def test_its_manager_is_a_manager_and_says_that_it_is_unverified(machine):
    machine(MI300X)
    manager = manager_for("cuda:0")
    assert isinstance(manager, AmdHardwareManager)
    assert isinstance(manager, HardwareManager)
    assert isinstance(manager.spec, DeviceSpec)
    assert manager.verified is manager.spec.verified is False
    assert manager.spec is manager.spec
