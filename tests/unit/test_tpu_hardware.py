"""What a TPU host is, read from planted PCI and device files; nothing here needs a chip or a TPU package."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kernel_pytorch import hardware
from kernel_pytorch.core.types import Skip
from kernel_pytorch.errors import KptError
from kernel_pytorch.hardware.tpu import installed, probe, specs

GIB = 1 << 30


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Plant a host's PCI devices and device files, with TorchTPU installed and no hint in the environment."""
    for name in [n for n in os.environ if n.startswith("TPU_")]:
        monkeypatch.delenv(name)
    for name in ("KPT_TPU_EMULATE", "KPT_TPU_RUNTIME", "KPT_TPU_PJRT_PLUGIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(probe, "ROOT", tmp_path)
    monkeypatch.setattr(installed, "version_of", lambda name: {"torch-tpu": "0.2.0", "libtpu": "0.0.52"}.get(name, ""))

    def plant(*devices: tuple[str, str], files: tuple[str, ...] = ()):
        for i, (vendor, device) in enumerate(devices):
            place = tmp_path / f"sys/bus/pci/devices/0000:00:{i:02x}.0"
            place.mkdir(parents=True)
            (place / "vendor").write_text(f"{vendor}\n")
            (place / "device").write_text(f"{device}\n")
        for name in files:
            path = tmp_path / "dev" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path

    return plant


GVNIC = ("0x1ae0", "0x0042")
V5E = ("0x1ae0", "0x0063")


@pytest.mark.parametrize(
    ("device", "files", "arch", "devices", "memory"),
    [
        ("0x0027", ("accel0",), "v3", 2, 16 * GIB),
        ("0x005e", ("accel0",), "v4", 1, 32 * GIB),
        ("0x0062", ("vfio/0",), "v5p", 1, 95 * GIB),
        ("0x0063", ("vfio/0",), "v5e", 1, 16 * GIB),
        ("0x006f", ("vfio/0",), "v6e", 1, 32 * GIB),
        ("0x0076", ("vfio/0",), "tpu7x", 2, 96 * GIB),
    ],
)
def test_a_chip_is_known_by_its_pci_device(host, device, files, arch, devices, memory):
    host(("0x1ae0", device), GVNIC, ("0x8086", "0x1237"), files=(*files, "vfio/vfio"))
    assert probe.absent(0) is None
    spec = probe.detect()
    assert (spec.vendor, spec.arch, spec.num_devices, spec.memory_bytes) == ("tpu", arch, devices, memory)
    assert spec.software["runtime"] == "torch_tpu 0.2.0"
    assert spec.software["libtpu"] == "0.0.52"
    assert not spec.verified
    assert spec.bandwidth_bytes_per_s * specs.CHIPS[arch].devices == specs.CHIPS[arch].bandwidth_bytes_per_s
    assert spec.sources.keys() == {f"peak_flops.{d}" for d in spec.peak_flops} | {"bandwidth_bytes_per_s"}
    assert list(spec.features) == sorted(spec.features)
    assert ("fp8" in spec.features) == (arch == "tpu7x"), "only there it is faster than bfloat16"


def test_chips_are_counted_by_what_this_process_may_reach(host, monkeypatch):
    host(*[V5E] * 8, files=tuple(f"vfio/{i}" for i in range(8)))
    assert probe.attached() == probe.Attached("v5e", 8, 8)
    monkeypatch.setenv("TPU_VISIBLE_CHIPS", "0,1")
    assert probe.attached() == probe.Attached("v5e", 2, 2)
    assert probe.absent(1) is None
    assert probe.absent(2).reason == "only 2 TPU device(s) are visible"
    assert probe.absent(2).fix == "use tpu:0 to tpu:1"


def test_chips_without_device_files_are_a_matter_of_the_container(host):
    host(V5E, V5E)
    skip = probe.absent(0)
    assert skip.reason.startswith("2 TPU chip(s) on PCI, but no /dev/accel*")
    assert "--privileged" in skip.fix


def test_what_cannot_be_read_is_not_there(host, tmp_path):
    root = host(V5E, files=("vfio/0",))
    (root / "sys/bus/pci/devices/0000:00:01.0").mkdir()
    (root / "sys/bus/pci/devices/0000:00:01.0/vendor").mkdir()  # reading it is an OSError
    assert probe.attached().chips == 1
    assert probe.attached(tmp_path / "nowhere") == probe.Attached("", 0, 0)


def test_the_environment_names_what_pci_does_not_tell(host):
    root = host(("0x1ae0", "0x0027"), files=("accel0",))
    assert probe.attached(root, {"TPU_ACCELERATOR_TYPE": "v2-8"}).generation == "v2"
    assert probe.attached(root, {"TPU_ACCELERATOR_TYPE": "v5litepod-8"}).generation == "v3", "PCI goes before"


def test_a_newer_generation_is_a_tpu_without_rates(host, monkeypatch):
    root = host(("0x1ae0", "0x0099"), ("0x1ae0", "0x0099"), GVNIC, files=("vfio/0", "vfio/1"))
    assert probe.attached().chips == 0
    hints = {"TPU_ACCELERATOR_TYPE": "v6e-2", "TPU_CHIPS_PER_HOST_BOUNDS": "1,2,1"}
    assert probe.attached(root, hints) == probe.Attached("v6e", 2, 2)
    monkeypatch.setitem(probe._PCI_DEVICES, "0x0099", "tpu9")
    spec = probe.detect()
    assert (spec.arch, spec.name, spec.num_devices) == ("tpu9", "TPU of an unknown generation", 2)
    assert spec.peak_flops == {}
    assert spec.bandwidth_bytes_per_s == 0.0


def test_no_tpu_is_one_plain_line_that_tells_what_answers_without_one(host):
    host(GVNIC)
    with pytest.raises(KptError, match=r"^device .tpu.: no TPU here$") as caught:
        hardware.split_device("tpu")
    assert "kpt fit TARGET --topology" in caught.value.fix
    assert hardware.split_device("auto")[0] != "tpu"


def test_a_chip_without_a_runtime_says_what_to_install(host, monkeypatch):
    host(V5E, files=("vfio/0",))
    monkeypatch.setattr(installed, "version_of", lambda name: "")
    assert probe.absent(0).reason == "PyTorch cannot run on a TPU here: none of torch_tpu, torch_xla is installed"
    assert probe.absent(0).fix.startswith("pip install torch-tpu")
    monkeypatch.setenv("KPT_TPU_RUNTIME", "jax")
    assert probe.absent(0).reason == "KPT_TPU_RUNTIME='jax' is no runtime"


def test_the_runtime_is_torch_tpu_before_torch_xla_and_may_be_named(monkeypatch):
    for name in ("KPT_TPU_EMULATE", "KPT_TPU_RUNTIME"):
        monkeypatch.delenv(name, raising=False)
    versions = {"torch-tpu": "0.2.0", "torch-xla": "2.9.0"}
    monkeypatch.setattr(installed, "version_of", lambda name: versions.get(name, ""))
    assert installed.runtime().label == "torch_tpu 0.2.0"
    monkeypatch.setenv("KPT_TPU_RUNTIME", "torch_xla")
    assert installed.runtime().label == "torch_xla 2.9.0"


def test_emulation_is_asked_for_named_everywhere_and_never_chosen(host, tmp_path, monkeypatch):
    host()
    library = tmp_path / "libpjrt_cpu.so"
    library.touch()
    monkeypatch.setenv("KPT_TPU_EMULATE", "1")
    monkeypatch.setenv("KPT_TPU_PJRT_PLUGIN", str(library))
    assert probe.absent(0) is None
    assert probe.absent(1).reason == "one TPU is emulated"
    assert not probe.automatic(0)
    spec = probe.detect()
    assert spec.arch == "emulated"
    assert installed.EMULATED in spec.name
    assert spec.software["runtime"] == f"torch_tpu 0.2.0 ({installed.EMULATED})"
    assert not spec.verified
    assert spec.peak_flops == {}, "times of a CPU have no floor of a TPU's"
    monkeypatch.setenv("KPT_TPU_PJRT_PLUGIN", str(tmp_path / "gone.so"))
    assert isinstance(probe.absent(0), Skip)


def test_a_chip_is_chosen_unasked(host):
    host(V5E, files=("vfio/0",))
    assert probe.automatic(0)
    assert not probe.automatic(1)


@pytest.mark.parametrize("name", specs.CHIPS)
def test_rates_are_of_one_chip_and_each_says_where_it_is_from(name):
    chip = specs.CHIPS[name]
    assert 1e13 < chip.bf16_flops < 1e16
    assert 10e9 < chip.hbm_bytes < 1e12
    assert 1e11 < chip.bandwidth_bytes_per_s < 1e13
    assert chip.devices in (1, chip.cores)
    for field in ("bf16_flops", "hbm_bytes", "bandwidth_bytes_per_s", "cores", "vmem_bytes"):
        assert chip.sources[field].startswith(("https://", "JAX")), field
    assert "float32" not in chip.peak_flops, "how many bfloat16 passes it takes is a setting"


def test_generations_only_grow():
    chips = [specs.CHIPS[name] for name in ("v2", "v3", "v4", "v5p", "tpu7x")]
    assert [c.bf16_flops for c in chips] == sorted(c.bf16_flops for c in chips)
    assert [c.bandwidth_bytes_per_s for c in chips] == sorted(c.bandwidth_bytes_per_s for c in chips)


@pytest.mark.parametrize(
    ("given", "generation"),
    [
        ("v5e:4x4", "v5e"),
        ("v5litepod-16", "v5e"),
        ("TPU v4", "v4"),
        ("TPU7x:2x2x1", "tpu7x"),
        ("v7x", "tpu7x"),
        ("TPU v5 lite", None),
        ("", None),
    ],
)
def test_a_generation_goes_by_many_names(given, generation):
    found = specs.chip(given)
    assert (found.generation if found else None) == generation


def test_detection_imports_no_tpu_package():
    code = (
        "import sys\nfrom kernel_pytorch.hardware import detect\n"
        "detect('cpu')\n"
        "from kernel_pytorch.hardware.tpu import probe\nprobe.absent(0)\n"
        "from kernel_pytorch.backends.tpu import TPUHardwareManager\nTPUHardwareManager()\n"
        "print([m for m in sys.modules if m.partition('.')[0] in ('torch_tpu', 'torch_xla', 'jax', 'libtpu')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_kpt_does_not_import_what_hooks_into_torch(tmp_path):
    """A package with the entry point of torch_tpu: `import torch` runs it, and `kpt` does not."""
    (tmp_path / "hook_of_torch.py").write_text("def load():\n    pass\n")
    distribution = tmp_path / "hook_of_torch-1.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: hook-of-torch\nVersion: 1\n")
    (distribution / "entry_points.txt").write_text("[torch.backends]\nhook = hook_of_torch:load\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"} | {"PYTHONPATH": path}
    told = "import sys; print('torch' in sys.modules, 'hook_of_torch' in sys.modules, file=sys.stderr)"
    for code, loaded in (
        (f"import torch; {told}", "True True"),
        (f"from kernel_pytorch.cli import main; main(['detect']); {told}", "True False"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=180
        )
        assert done.stderr.strip().splitlines()[-1] == loaded, done.stderr
