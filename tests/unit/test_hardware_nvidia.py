"""Facts of NVIDIA GPUs, with torch's answers planted: no GPU is needed to read a data sheet."""

from __future__ import annotations

import contextlib
import sys
import types

import pytest
import torch

from kernel_pytorch.backends.nvidia import telemetry
from kernel_pytorch.backends.nvidia.manager import NvidiaHardwareManager
from kernel_pytorch.errors import KptError
from kernel_pytorch.hardware import split_device
from kernel_pytorch.hardware.nvidia import nvml, probe, specs


@pytest.fixture(autouse=True)
def forget_opened_gpus():
    """What NVML opened is kept for a process; a test has its own NVML."""
    nvml.open_gpu.cache_clear()
    yield
    nvml.open_gpu.cache_clear()


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
        monkeypatch.setattr(torch.version, "hip", None)
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
    """NVML where one question may be refused, and UUIDs of MIG slices are known."""

    class NVMLError(Exception):
        """As in pynvml."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_NVLINK_MAX_LINKS = 18

    def __init__(self, *, refuse_all=False, slices=(), links=(), peers=True):
        super().__init__("pynvml")
        self.asked = ""
        self.refuse_all = refuse_all
        self.slices, self.links, self.peers = slices, links, peers

    def nvmlInit(self):
        if self.refuse_all:
            raise self.NVMLError

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self.asked = uuid
        if uuid.startswith("GPU-") == (uuid[4:] in self.slices):
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceIsMigDeviceHandle(self, handle):
        return int(handle.startswith("MIG-"))

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle):
        return "GPU-whole"

    def nvmlDeviceGetClockInfo(self, handle, which):
        assert handle.startswith("GPU-"), "a slice has no clocks"
        return {1: 1980, 2: 3201}[which]

    def nvmlDeviceGetPowerUsage(self, handle):
        raise self.NVMLError("Insufficient Permissions")

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return 41

    def nvmlDeviceGetUtilizationRates(self, handle):
        return types.SimpleNamespace(gpu=7)

    def nvmlDeviceGetMemoryInfo(self, handle):
        if handle.startswith("MIG-"):
            return types.SimpleNamespace(used=1 << 28, total=18 << 30)
        return types.SimpleNamespace(used=1 << 30, total=141 << 30)

    def nvmlDeviceGetAttributes(self, handle):
        return types.SimpleNamespace(multiprocessorCount=16)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return 4

    def nvmlSystemGetDriverVersion(self):
        return "580.65.06"

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle):
        return 5

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle):
        return 16

    def nvmlDeviceGetNvLinkState(self, handle, link):
        if not self.links:
            raise self.NVMLError("Not Supported")
        return int(link in self.links)

    def nvmlDeviceGetNvLinkVersion(self, handle, link):
        assert link in self.links
        return 4

    def nvmlDeviceGetP2PStatus(self, one, other, index):
        return 0 if self.peers else 5


@pytest.fixture
def plant_nvml(monkeypatch):
    def plant(**facts):
        fake = FakeNvml(**facts)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        nvml.open_gpu.cache_clear()
        return fake

    return plant


def with_uuid(properties, uuid):
    return types.SimpleNamespace(**{**vars(properties), "uuid": uuid})


def test_nvml_adds_links_and_versions(machine, plant_nvml, monkeypatch, tmp_path):
    monkeypatch.setattr(probe, "_DRIVER", tmp_path / "not there")
    machine(with_uuid(H200, "a"), with_uuid(H200, "b"))
    plant_nvml(links=range(18))
    spec = probe.detect(0)
    assert {"nvlink", "nvlink_peers"} <= set(spec.features)
    assert spec.software["nvlink"] == "18 links, version 4"
    assert spec.software["pcie"] == "5 x16"
    assert spec.software["driver"] == "580.65.06"
    plant_nvml(links=range(18), peers=False)
    assert "nvlink" in probe.detect(0).features
    assert "nvlink_peers" not in probe.detect(0).features


def test_one_gpu_has_links_and_no_peers(machine, plant_nvml):
    machine(with_uuid(H200, "a"), with_uuid(L4, "b"))
    plant_nvml(links=range(18))
    assert "nvlink" in probe.detect(0).features
    assert "nvlink_peers" not in probe.detect(0).features
    plant_nvml()
    assert "nvlink" not in probe.detect(1).features
    assert "nvlink" not in probe.detect(1).software


@pytest.mark.parametrize("refuse_all", [True, False])
def test_without_nvml_its_facts_are_absent(machine, monkeypatch, plant_nvml, refuse_all):
    machine(with_uuid(H200, "a"))
    if refuse_all:
        plant_nvml(refuse_all=True)
    else:
        monkeypatch.setitem(sys.modules, "pynvml", None)
    spec = probe.detect(0)
    assert not {"pcie", "nvlink", "mig"} & set(spec.software)
    assert not {"nvlink", "nvlink_peers", "mig"} & set(spec.features)
    assert spec.memory_bytes == H200.total_memory


def test_a_mig_slice_has_its_own_memory_and_its_share_of_the_bandwidth(machine, plant_nvml):
    piece = gpu(9, 0, 16, 20, memory_clock_rate=3_201_000, memory_bus_width=768, clock_rate=1_980_000, uuid="s")
    machine(piece)
    plant_nvml(slices=("s",))
    spec = probe.detect(0)
    assert spec.arch == "sm_90"
    assert "mig" in spec.features
    assert spec.memory_bytes == 18 << 30
    assert spec.software["mig"] == "16 multiprocessors"
    assert spec.peak_flops["bfloat16"] == pytest.approx(989.5e12 * 16 / 132)
    assert spec.bandwidth_bytes_per_s == pytest.approx(4.8e12 / 8), "1g.18gb has one of eight memory slices"
    assert "1/8" in spec.sources["bandwidth_bytes_per_s"]


@pytest.mark.parametrize(
    ("share", "eighths"), [(4864 / 40960, 1), (0.25, 2), (0.5, 4), (1.0, 8), (0.01, 1), (16 / 141, 1)]
)
def test_memory_slices_are_eighths(share, eighths):
    rates = specs.Rates({}, 8.0, {"bandwidth_bytes_per_s": "x"})
    assert specs.of_slice(rates, share).bandwidth_bytes_per_s == eighths


def test_telemetry_of_a_mig_slice_is_of_its_gpu_and_its_own_memory(plant_nvml):
    plant_nvml(slices=("1234",))
    values = telemetry.read("1234")
    assert values["sm_clock_mhz"] == 1980.0
    assert values["memory_used_bytes"] == float(1 << 28)


@pytest.mark.parametrize(
    ("capability", "has", "lacks"),
    [
        ((7, 0), {"fp16", "tensor_cores", "cuda_graphs", "triton"}, {"bf16", "int8_tensor_cores", "tf32"}),
        ((7, 5), {"int8_tensor_cores"}, {"bf16", "tf32", "fp8"}),
        ((8, 0), {"bf16", "tf32"}, {"fp8", "tma"}),
        ((8, 6), {"bf16", "tf32"}, {"fp8", "tma"}),
        ((8, 9), {"fp8"}, {"tma", "wgmma", "mxfp8"}),
        ((9, 0), {"fp8", "tma", "wgmma"}, {"mxfp8", "nvfp4", "tcgen05"}),
        ((10, 0), {"mxfp8", "mxfp4", "nvfp4", "tcgen05", "tma"}, {"wgmma"}),
        ((10, 3), {"mxfp8", "mxfp4", "nvfp4", "tcgen05", "tma"}, {"wgmma"}),
        ((11, 0), {"tcgen05", "nvfp4"}, {"wgmma"}),
        ((12, 0), {"fp8", "mxfp8", "nvfp4", "tma"}, {"wgmma", "tcgen05"}),
        ((12, 1), {"fp8", "mxfp8", "nvfp4", "tma"}, {"wgmma", "tcgen05"}),
    ],
)
def test_features_by_capability(capability, has, lacks):
    found = set(specs.features(capability))
    assert has <= found
    assert not lacks & found


def test_cublas_says_its_version_itself(monkeypatch, tmp_path):
    maps = tmp_path / "maps"
    maps.write_text("7f00-7f01 r-xp 00000000 08:01 42   /usr/lib/libcublasLt.so.13\n")
    monkeypatch.setattr(probe, "_MAPS", maps)
    asked = []

    def version():
        return 130002

    monkeypatch.setattr(
        probe.ctypes, "CDLL", lambda path: asked.append(path) or types.SimpleNamespace(cublasLtGetVersion=version)
    )
    assert probe._cublas_version() == "130002"
    assert asked == ["/usr/lib/libcublasLt.so.13"]
    maps.write_text("7f00-7f01 r-xp 00000000 08:01 42   /usr/lib/libc.so\n")
    assert probe._cublas_version() == ""


def test_telemetry_leaves_out_what_nvml_refuses(monkeypatch):
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
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
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(refuse_all=True))
    assert telemetry.read("1234") == {}
    nvml.open_gpu.cache_clear()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert telemetry.read("1234") == {}


class FakeCuda:
    """The parts of `torch.cuda` that a captured graph is timed with; tells in which order they were used."""

    def __init__(self, log):
        self.log = log

    def wait_stream(self, stream):
        self.log.append("wait")

    def Event(self, *, enable_timing):
        assert enable_timing
        event = types.SimpleNamespace(elapsed_time=lambda end: 0.25)
        event.record = lambda: self.log.append("record")
        return event

    def CUDAGraph(self):
        return types.SimpleNamespace(replay=lambda: self.log.append("replay"))

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream):
        assert pool == (0, 1)
        assert stream is self
        self.log.append("capture")
        yield
        self.log.append("captured")


@pytest.mark.parametrize("flush", [False, True])
def test_a_graph_is_timed_behind_work_that_hides_its_launch(machine, monkeypatch, flush):
    machine(H200)
    log = []
    fake = FakeCuda(log)
    nothing = contextlib.nullcontext
    monkeypatch.setattr(torch.cuda, "device", lambda _: nothing())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nothing())
    monkeypatch.setattr(torch.cuda, "Stream", lambda: fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: fake)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", fake.CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", fake.graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "Event", fake.Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("busy"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: log.append("synchronize"))
    manager = NvidiaHardwareManager()
    if flush:
        manager._scratch = types.SimpleNamespace(zero_=lambda: log.append("flush"))
    times = manager.time_graph_ms(lambda: log.append("work"), samples=2)
    assert times == (0.25, 0.25)
    prepared = ["wait", "work", "work", "work", "wait", "capture", "work", "captured"]
    sample = [*(["flush"] if flush else []), "busy", "record", "replay", "record", "synchronize"]
    assert log == prepared + 2 * sample
