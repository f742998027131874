"""What is this machine? Facts only: detected, never configured; needs no model and launches no work but probes."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

from kernel_pytorch.errors import KptError

if TYPE_CHECKING:
    from kernel_pytorch.core.types import DeviceSpec

__all__ = ["VENDORS", "cache_bytes", "detect", "split_device"]

VENDORS: tuple[str, ...] = ("nvidia", "amd", "intel", "tpu", "cpu")
"""Vendors with a package under `hardware` and `backends` and a contract suite that runs them; `auto` tries in
this order."""


def detect(device: str = "auto") -> DeviceSpec:
    """Return the facts of a device, detected once per process.

    Args:
        device: `auto` (the first vendor present), a vendor (`cpu`, `nvidia`, `amd:1`), or a torch device (`cuda:1`,
            `xpu`, `xla`); `cuda` is an AMD GPU where torch is a ROCm build.

    Raises:
        KptError: The device is unknown, not supported, or not present.
    """
    vendor, index = split_device(device)
    return _detect(vendor, index)


def split_device(device: str) -> tuple[str, int]:
    """Return vendor and index of a device string; `auto` becomes the first vendor that is present.

    Raises:
        KptError: The device is unknown, not supported, or not present.
    """
    name, _, number = device.strip().lower().partition(":")
    if number and not number.isdecimal():
        raise KptError(f"device {device!r}: the part after the colon must be a number", fix="for example cuda:1")
    index = int(number or 0)
    if name == "auto":
        return next(vendor for vendor in VENDORS if _automatic(vendor, index)), index
    vendor = _vendor_of(name)
    if vendor not in VENDORS:
        raise KptError(
            f"device {device!r} is not supported; supported here: "
            "auto, cpu, nvidia or amd (cuda, cuda:N), intel (xpu), tpu (xla)",
            fix="docs/adding-a-backend.md tells how to add a vendor",
        )
    absent = _probe(vendor).absent(index)
    if absent is not None:
        raise KptError(f"device {device!r}: {absent.reason}", fix=absent.fix)
    return vendor, index


def cache_bytes(device: DeviceSpec) -> int:
    """Return the size of the last-level cache of this machine's device in bytes; 0 where it does not tell.

    Data that fit in it may stay there from one call to the next, so they are no part of a bandwidth floor.
    """
    size: int = _probe(device.vendor).cache_bytes()
    return size


def _vendor_of(name: str) -> str:
    """Return the vendor of a torch device type; another name as it is."""
    if name == "cuda":
        import torch

        return "nvidia" if torch.version.hip is None else "amd"
    return {"xpu": "intel", "xla": "tpu"}.get(name, name)


def _automatic(vendor: str, index: int) -> bool:
    """Return whether a device is present and may be chosen unasked: the emulation of one may not."""
    probe = _probe(vendor)
    chosen: bool = probe.automatic(index) if hasattr(probe, "automatic") else probe.absent(index) is None
    return chosen


def _probe(vendor: str) -> Any:
    return importlib.import_module(f"{__name__}.{vendor}.probe")


@functools.cache
def _detect(vendor: str, index: int) -> DeviceSpec:
    spec: DeviceSpec = _probe(vendor).detect(index)
    return spec
