"""What TPU is here, from PCI and device files alone: no network metadata, and no TPU package is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from kernel_pytorch.core.types import DeviceSpec, Skip
from kernel_pytorch.hardware.cpu import probe as host
from kernel_pytorch.hardware.tpu import installed, specs

__all__ = ["ROOT", "VERIFIED_ARCHES", "Attached", "absent", "attached", "automatic", "cache_bytes", "detect"]

VERIFIED_ARCHES: frozenset[str] = frozenset()
"""Generations on which `tests/contracts` has been run on real hardware: none yet."""

ROOT = Path("/")
"""Where `sys` and `dev` lie; another directory in tests."""

_GOOGLE = "0x1ae0"
_PCI_DEVICES = {
    "0x0027": "v3",
    "0x005e": "v4",
    "0x0062": "v5p",
    "0x0063": "v5e",
    "0x006f": "v6e",
    "0x0076": "tpu7x",
}
"""PCI device ids as JAX 0.10.2 (`jax/_src/hardware_utils.py`) and torch-tpu 0.2.0 list them."""

_AHEAD_OF_TIME = (
    "`kpt fit TARGET --topology v5e:2x2` asks the TPU's compiler ahead of time, on any Linux machine; "
    "to try the steps without a chip set KPT_TPU_EMULATE=1"
)


@dataclass(frozen=True, slots=True)
class Attached:
    """The chips of this host.

    Attributes:
        generation: `v5e`; empty where neither PCI nor the environment tells.
        chips: On PCI and visible to this process.
        reachable: How many of them have a device file here (`/dev/accel*`, `/dev/vfio/*`).
    """

    generation: str
    chips: int
    reachable: int


def attached(root: Path | None = None, environ: Mapping[str, str] | None = None) -> Attached:
    """Return the chips that PCI shows.

    Args:
        root: Where `sys` and `dev` lie; `ROOT` by default.
        environ: `TPU_ACCELERATOR_TYPE` names the generation where PCI does not, and tells v2 from v3, which share an
            id; `TPU_VISIBLE_CHIPS` (or `TPU_VISIBLE_DEVICES`) hides chips, as the runtime reads it; without PCI ids
            that are known, `TPU_CHIPS_PER_HOST_BOUNDS` bounds the number.
    """
    root, environ = ROOT if root is None else root, os.environ if environ is None else environ
    hint = specs.chip(environ.get("TPU_ACCELERATOR_TYPE", ""))
    found = [_PCI_DEVICES.get(device, "") for device in _google_devices(root)]
    known = [generation for generation in found if generation]
    if not known and hint is not None and found:  # a generation newer than this table, beside Google's other devices
        known = [hint.generation] * min(len(found), _product(environ.get("TPU_CHIPS_PER_HOST_BOUNDS", "")))
    generation = known[0] if known else ""
    if generation == "v3" and hint is not None and hint.generation == "v2":
        generation = "v2"
    visible = environ.get("TPU_VISIBLE_CHIPS", environ.get("TPU_VISIBLE_DEVICES", ""))
    chips = min(len(known), len([p for p in visible.split(",") if p.strip()])) if visible.strip() else len(known)
    return Attached(generation, chips, min(chips, _device_files(root)))


def absent(index: int) -> Skip | None:
    """Return why the TPU is not there; `None` where it is, or where its emulation was asked for and can run."""
    if installed.emulated():
        return _not_emulated() or (Skip("one TPU is emulated", "use tpu or tpu:0") if index else None)
    here, runtime = attached(), installed.runtime()
    if not here.chips:
        return Skip("no TPU here", _AHEAD_OF_TIME)
    if not here.reachable:
        return Skip(
            f"{here.chips} TPU chip(s) on PCI, but no /dev/accel* and no /dev/vfio/* to reach them",
            "start the container with --privileged, or with the devices passed through",
        )
    if isinstance(runtime, Skip):
        return runtime
    count = _devices(here)
    return Skip(f"only {count} TPU device(s) are visible", f"use tpu:0 to tpu:{count - 1}") if index >= count else None


def _not_emulated() -> Skip | None:
    """Return why a TPU cannot be emulated here; `None` where it can."""
    runtime = installed.runtime()
    if isinstance(runtime, Skip):
        return runtime
    library = installed.plugin() if runtime.name == "torch_tpu" else None  # PyTorch/XLA brings a CPU client
    return library if isinstance(library, Skip) else None


def automatic(index: int) -> bool:
    """Return whether `auto` may choose it: a chip, never its emulation."""
    return not installed.emulated() and absent(index) is None


def detect(index: int = 0) -> DeviceSpec:
    """Return the facts of one device (half a chip where its cores are apart) and how many this host has."""
    del index  # the chips of a host are alike
    runtime = installed.runtime()
    assert isinstance(runtime, installed.Installed), "absent() says why there is none"
    versions = {"libtpu": installed.version_of("libtpu"), "jax": installed.version_of("jax")}
    software = host.software() | {"runtime": runtime.label} | {name: v for name, v in versions.items() if v}
    if runtime.emulated:
        return DeviceSpec(
            vendor="tpu",
            name=f"TPU {installed.EMULATED}",
            arch="emulated",
            memory_bytes=psutil.virtual_memory().total,
            num_devices=1,
            features=tuple(sorted({"bf16", "emulated", runtime.name})),
            peak_flops={},
            bandwidth_bytes_per_s=0.0,
            software=software,
        )
    here = attached()
    chip = specs.CHIPS.get(here.generation)
    features = {"bf16", runtime.name}
    if chip is not None:
        features |= {"int8"} if chip.int8_ops else set()
        features |= {"fp8"} if chip.fp8_flops and chip.fp8_flops > chip.bf16_flops else set()
    return DeviceSpec(
        vendor="tpu",
        name=chip.name if chip else "TPU of an unknown generation",
        arch=here.generation or "unknown",
        memory_bytes=chip.hbm_bytes // chip.devices if chip else 0,
        num_devices=_devices(here),
        features=tuple(sorted(features)),
        peak_flops=chip.peak_flops if chip else {},
        bandwidth_bytes_per_s=chip.bandwidth_bytes_per_s / chip.devices if chip else 0.0,
        software=software,
        sources=chip.rate_sources if chip else {},
        verified=here.generation in VERIFIED_ARCHES,
    )


def cache_bytes() -> int:
    """Return 0: on-chip memory is the compiler's scratch, and keeps nothing from one program to the next."""
    return 0


def _devices(here: Attached) -> int:
    chip = specs.CHIPS.get(here.generation)
    return here.reachable * (chip.devices if chip else 1)


def _google_devices(root: Path) -> list[str]:
    """Return the PCI device ids of Google's devices, in the order of their addresses; network cards are among them."""
    found = []
    for vendor in sorted((root / "sys/bus/pci/devices").glob("*/vendor")):
        try:
            if vendor.read_text(encoding="ascii").strip() == _GOOGLE:
                found.append(vendor.with_name("device").read_text(encoding="ascii").strip())
        except OSError:  # not permitted: what cannot be read is not there
            continue
    return found


def _device_files(root: Path) -> int:
    """Return how many chips have a file: `/dev/accelN` to v4, a numbered group of `/dev/vfio` since v5."""
    groups = [path for path in (root / "dev/vfio").glob("*") if path.name.isdecimal()]
    return len([*(root / "dev").glob("accel[0-9]*"), *(root / "dev/accel").glob("accel[0-9]*")]) or len(groups)


def _product(bounds: str) -> int:
    """Return the chips that bounds such as `2,2,1` hold; without any, as many as there may be."""
    total = 1
    for part in bounds.split(","):
        total *= int(part) if part.strip().isdecimal() else 1
    return total if bounds.strip() else 1 << 16
