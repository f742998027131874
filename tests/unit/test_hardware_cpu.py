"""Facts of a CPU: what the kernel, the cgroup and the compiler tell, and rates that are measured once."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from kernel_pytorch.core.types import DeviceSpec
from kernel_pytorch.errors import KptError
from kernel_pytorch.hardware import cache_bytes, detect, split_device
from kernel_pytorch.hardware.cpu import probe, specs


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "kernel_pytorch" / "cpu_rates.json"


@pytest.fixture
def measurements(monkeypatch):
    """Counts measurements, each of which finds a machine twice as fast."""
    taken = []

    def measure(cores):
        taken.append(cores)
        return specs.Rates(dict.fromkeys(("float32", "bfloat16", "int8"), 1e11 * 2 ** len(taken)), 1e10)

    monkeypatch.setattr(specs, "_measure", measure)
    return taken


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(specs, "_busy_seconds", lambda: 0.0)


@pytest.fixture
def noisy(monkeypatch):
    monkeypatch.setattr(specs, "_busy_seconds", lambda: time.perf_counter() * 1e6)


def test_detects_this_machine():
    spec = detect("cpu")
    assert isinstance(spec, DeviceSpec)
    assert (spec.vendor, spec.verified) == ("cpu", True)
    assert spec.key == f"cpu-{spec.arch}-{spec.num_devices}"
    assert set(spec.peak_flops) == {"float32", "bfloat16", "int8"}
    assert set(spec.sources.values()) == {"measured"}
    assert {"torch", "python", "os"} <= set(spec.software)
    assert cache_bytes(spec) >= 0
    assert detect("cpu") is spec


def test_auto_falls_back_to_the_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert split_device("auto") == ("cpu", 0)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("npu", "not supported; supported here: auto, cpu, nvidia"),
        ("tpu", "no TPU here"),
        ("xpu:0", "not supported"),
        ("", "not supported"),
        ("cpu:1", "cpu:1 does not exist"),
        ("cuda:first", "must be a number"),
    ],
)
def test_a_device_that_is_not_there_is_one_clear_line_with_a_fix(device, message, monkeypatch):
    monkeypatch.delenv("KPT_TPU_EMULATE", raising=False)
    with pytest.raises(KptError, match=message) as caught:
        detect(device)
    assert "\n" not in str(caught.value)
    assert caught.value.fix


def cpuinfo(monkeypatch, text):
    real = probe._read
    monkeypatch.setattr(probe, "_read", lambda path: text if str(path) == "/proc/cpuinfo" else real(path))


def test_features_of_an_x86_cpu_and_amx_only_where_the_kernel_grants_it(monkeypatch):
    cpuinfo(monkeypatch, "model name\t: Xeon\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 amx_int8 amx_tile\n")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert probe.cpu_features() == ("amx_bf16", "amx_int8", "avx2", "avx512_bf16", "avx512f")
    assert probe.cpu_name() == "Xeon"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert probe.cpu_features() == ("avx2", "avx512_bf16", "avx512f")


def test_features_of_an_arm_cpu(monkeypatch):
    cpuinfo(monkeypatch, "processor\t: 0\nFeatures\t: fp asimd asimddp sve bf16 i8mm\n")
    assert probe.cpu_features() == ("bf16", "dotprod", "i8mm", "neon", "sve")


def test_the_arch_is_named_by_the_best_instruction_set(monkeypatch):
    monkeypatch.setattr(probe.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(probe, "cpu_features", lambda: ("bf16", "neon", "sve", "sve2"))
    monkeypatch.setattr(probe.specs, "peak_rates", lambda key, cores: specs.Rates({}, 1.0))
    assert probe.detect().arch == "aarch64-sve2"


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("3200000 100000", 8)]
)
def test_cores_are_bounded_by_the_cgroup(monkeypatch, quota, cores):
    monkeypatch.setattr(probe.os, "sched_getaffinity", lambda pid: set(range(8)))
    files = {"/proc/self/cgroup": "0::/a/b", "/sys/fs/cgroup/a/cpu.max": quota}
    monkeypatch.setattr(probe, "_read", lambda path: files.get(str(path), ""))
    assert probe.usable_cores() == cores


def test_two_threads_of_one_core_count_once(monkeypatch):
    monkeypatch.setattr(probe.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    siblings = {
        f"/sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": f"{i % 2},{i % 2 + 2}" for i in range(4)
    }
    monkeypatch.setattr(probe, "_read", lambda path: siblings.get(str(path), ""))
    assert probe.usable_cores() == 2


def test_memory_is_that_of_the_tightest_cgroup(monkeypatch):
    files = {
        "/proc/self/cgroup": "4:memory:/outer/inner\n0::/",
        "/sys/fs/cgroup/memory/outer/inner/memory.limit_in_bytes": "9223372036854771712",
        "/sys/fs/cgroup/memory/outer/memory.limit_in_bytes": str(64 << 20),
    }
    monkeypatch.setattr(probe, "_read", lambda path: files.get(str(path), ""))
    assert probe.usable_memory_bytes() == 64 << 20


def test_the_compiler_is_the_one_inductor_takes_and_its_absence_is_a_missing_feature(monkeypatch, tmp_path):
    fake = tmp_path / "mine++"
    fake.write_text("#!/bin/sh\necho 'mine++ 1.2'\necho more\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    assert probe.compiler_version() == "mine++ 1.2"
    fake.write_text("#!/bin/sh\nexit 1\n")
    assert probe.compiler_version() == ""
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    monkeypatch.setattr(probe.specs, "peak_rates", lambda key, cores: specs.Rates({}, 1.0))
    spec = probe.detect()
    assert "cxx_compiler" not in spec.features
    assert "compiler" not in spec.software


def test_rates_are_measured_once_on_a_quiet_machine(cache, measurements, quiet):
    first = specs.peak_rates("cpu", 1)
    assert specs.peak_rates("cpu", 1) == first
    assert len(measurements) == 1
    specs.peak_rates("another cpu", 1)
    assert len(measurements) == 2
    assert set(json.loads(cache.read_text())) == {"cpu", "another cpu"}


def test_rates_measured_under_foreign_load_are_measured_again_and_the_best_is_kept(cache, measurements, noisy):
    assert specs.peak_rates("cpu", 1).flops["int8"] == 2e11
    assert specs.peak_rates("cpu", 1).flops["int8"] == 4e11
    entry = json.loads(cache.read_text())
    entry["cpu"]["flops"]["int8"] = 9e13
    cache.write_text(json.dumps(entry))
    assert specs.peak_rates("cpu", 1).flops["int8"] == 9e13
    assert len(measurements) == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"cpu": 3}',
        '{"cpu": {"flops": {"float32": "fast"}, "bandwidth_bytes_per_s": 1, "quiet": true}}',
        '{"cpu": {"flops": {"float32": -1, "bfloat16": 1, "int8": 1}, "bandwidth_bytes_per_s": 1, "quiet": true}}',
        '{"cpu": {"flops": {"float32": 1}, "bandwidth_bytes_per_s": 1, "quiet": true}}',
        "\x00\xff",
    ],
)
def test_a_corrupt_cache_is_ignored_and_replaced(cache, measurements, quiet, text):
    cache.parent.mkdir()
    cache.write_bytes(text.encode("latin-1"))
    assert specs.peak_rates("cpu", 1).flops["int8"] == 2e11
    specs.peak_rates("cpu", 1)
    assert len(measurements) == 1


def test_a_cache_that_cannot_be_written_costs_only_the_next_measurement(tmp_path, monkeypatch, measurements, quiet):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert specs.peak_rates("cpu", 1).flops["int8"] == 2e11
    assert specs.peak_rates("cpu", 1).flops["int8"] == 4e11


def test_measuring_keeps_the_thread_count_and_the_generator(monkeypatch):
    monkeypatch.setattr(specs, "_GEMM", 64)
    monkeypatch.setattr(specs, "_COPY_BYTES", 1 << 20)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    rates = specs._measure(1)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert all(rate > 0 for rate in (*rates.flops.values(), rates.bandwidth_bytes_per_s))


def test_importing_hardware_imports_no_torch():
    code = "import sys, kernel_pytorch.hardware; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
