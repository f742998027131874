"""Peak rates, memory and links of TPU generations, from Google's own documents. All figures are those of one chip.

Rates are dense peaks at the published clock, so they are upper bounds. What no document gives is `None`: nothing is
scaled or guessed. float32 has no row: the matrix units multiply bfloat16, and how many passes a float32 product takes
is a setting of the runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["CHIPS", "Chip", "chip"]

_GIB = 1 << 30
_MIB = 1 << 20
_DOCS = "https://docs.cloud.google.com/tpu/docs/"
_JAX = "JAX 0.10.2, jax/_src/pallas/mosaic/tpu_info.py"


@dataclass(frozen=True, slots=True)
class Chip:
    """One generation.

    Attributes:
        generation: As topologies and accelerator types name it: `v5e`.
        bf16_flops: Floating-point operations a second in bfloat16.
        int8_ops: Integer operations a second; `None` where no document gives them.
        fp8_flops: The same of FP8. v5p and v6e have the rate of bfloat16 (the units convert), TPU7x twice that.
        hbm_bytes: Memory.
        bandwidth_bytes_per_s: Of that memory.
        ici_bytes_per_s: Of all links to other chips together, both directions.
        cores: TensorCores.
        devices: What a runtime shows of a chip: two where the cores are apart (v2, v3, TPU7x), else one.
        vmem_bytes: On-chip vector memory of one core.
        sources: The document of each field.
    """

    generation: str
    bf16_flops: float
    int8_ops: float | None
    fp8_flops: float | None
    hbm_bytes: int
    bandwidth_bytes_per_s: float
    ici_bytes_per_s: float | None
    cores: int
    devices: int
    vmem_bytes: int
    sources: Mapping[str, str]

    @property
    def name(self) -> str:
        """The name for people: `TPU v5e`."""
        return self.generation.upper().replace("X", "x") if self.generation.startswith("tpu") else f"TPU {self}"

    def __str__(self) -> str:
        return self.generation

    @property
    def peak_flops(self) -> dict[str, float]:
        """Operations a second of one device of the chip by dtype name, as `DeviceSpec` has them."""
        rates = {"bfloat16": self.bf16_flops, "int8": self.int8_ops, "float8_e4m3fn": self.fp8_flops}
        return {dtype: rate / self.devices for dtype, rate in rates.items() if rate is not None}

    @property
    def rate_sources(self) -> dict[str, str]:
        """The document behind each rate of `peak_flops` and the bandwidth, by the names `DeviceSpec.sources` uses."""
        fields = {"bfloat16": "bf16_flops", "int8": "int8_ops", "float8_e4m3fn": "fp8_flops"}
        share = f", a device being 1/{self.devices} of a chip" if self.devices > 1 else ""
        found = {f"peak_flops.{dtype}": self.sources[fields[dtype]] + share for dtype in self.peak_flops}
        return found | {"bandwidth_bytes_per_s": self.sources["bandwidth_bytes_per_s"] + share}


def _sources(page: str, **others: str) -> dict[str, str]:
    """Return the source of every field: a page of the documentation, VMEM from JAX, and the exceptions."""
    fields = ("bf16_flops", "int8_ops", "fp8_flops", "hbm_bytes", "bandwidth_bytes_per_s", "ici_bytes_per_s", "cores")
    return dict.fromkeys(fields, f"{_DOCS}{page}" if page else _JAX) | {"vmem_bytes": _JAX} | others


CHIPS: Mapping[str, Chip] = {
    chip.generation: chip
    for chip in (
        Chip("v2", 46e12, None, None, 16_000_000_000, 716e9, None, 2, 2, 16 * _MIB, _sources("")),
        Chip("v3", 123e12, None, None, 32 * _GIB, 900e9, None, 2, 2, 16 * _MIB, _sources("v3")),
        Chip("v4", 275e12, 275e12, None, 32 * _GIB, 1200e9, None, 2, 1, 16 * _MIB, _sources("v4")),
        Chip("v5e", 197e12, 393e12, None, 16 * _GIB, 819e9, 400e9, 1, 1, 128 * _MIB, _sources("v5e")),
        Chip(
            "v5p", 459e12, 918e12, 459e12, 95 * _GIB, 2765e9, 1200e9, 2, 1, 64 * _MIB, _sources("tpu7x", int8_ops=_JAX)
        ),
        Chip("v6e", 918e12, 1836e12, 918e12, 32 * _GIB, 1638e9, 800e9, 1, 1, 128 * _MIB, _sources("v6e")),
        Chip("tpu7x", 2307e12, None, 4614e12, 192 * _GIB, 7380e9, 1200e9, 2, 2, 64 * _MIB, _sources("tpu7x")),
    )
}
"""Every generation the project knows, oldest first, by its name."""

_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e", "v6litepod": "v6e", "v7x": "tpu7x", "tpu7": "tpu7x"}


def chip(name: str) -> Chip | None:
    """Return the generation that a topology, an accelerator type or a device name begins with, if it is known.

    Args:
        name: `v5e`, `v5e:4x4`, `v5litepod-16`, `TPU v4`, `TPU7x`: case and the word TPU do not matter.
    """
    plain = name.strip().lower().removeprefix("tpu ").partition(":")[0].partition("-")[0].strip()
    return CHIPS.get(_ALIASES.get(plain, plain))
