"""Peak rates and abilities of Intel GPUs by architecture, from the vendor's documents.

The architecture is the IP version that SYCL tells (`sycl_ext_oneapi_device_architecture`): `xe12.60` is Xe-HPC (Data
Center GPU Max), `xe12.55` to `xe12.57` Xe-HPG (Arc A), `xe20.1` Xe2-HPG (Arc B). Dense rates at the highest clock.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Rates", "arch_of", "peak_rates"]


UNCHECKED = "figure not yet held against the document"


@dataclass(frozen=True, slots=True)
class Rates:
    """Peak rates: operations a second by dtype name, bytes a second, and where each comes from."""

    flops: dict[str, float]
    bandwidth_bytes_per_s: float
    sources: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Reference:
    """The largest product of an architecture.

    Attributes:
        product: The product and the document.
        vector_engines: As SYCL counts them (`gpu_eu_count`).
        tflops: By dtype name.
        bandwidth: Bytes a second by the least memory (GB) a product has to have, largest first.
    """

    product: str
    vector_engines: int
    tflops: dict[str, float]
    bandwidth: tuple[tuple[float, float], ...]


# https://www.intel.com/content/www/us/en/products/sku/229151/intel-arc-a770-graphics-16gb/specifications.html
# 512 vector engines at up to 2.4 GHz; a clock of one is 16 FP32 and 128 FP16, 256 INT8 operations on XMX
# (https://www.intel.com/content/www/us/en/developer/articles/technical/introduction-to-the-xe-hpg-architecture.html)
_ALCHEMIST = _Reference(
    "Arc A770 specifications at its maximum clock, Xe-HPG architecture paper",
    512,
    {"float32": 19.7, "float16": 157.3, "bfloat16": 157.3, "int8": 314.6},
    ((12, 0.56e12), (0, 0.512e12)),
)

_REFERENCES: dict[str, _Reference] = {
    # https://www.intel.com/content/www/us/en/products/sku/232873/intel-data-center-gpu-max-1550/specifications.html
    # https://www.intel.com/content/www/us/en/content-details/753139/ (Max series, product brief). With one device a
    # tile, as the driver shows them by default, each has half of the engines, the memory and its bandwidth.
    "xe12.60": _Reference(
        "Data Center GPU Max 1550 product brief",
        1024,
        {"float64": 52.4, "float32": 52.4, "tf32": 419.4, "float16": 838.9, "bfloat16": 838.9, "int8": 1677.7},
        ((100, 3.2768e12), (55, 1.6384e12), (0, 1.2288e12)),
    ),
    "xe12.55": _ALCHEMIST,
    # https://www.intel.com/content/www/us/en/products/sku/241598/intel-arc-b580-graphics/specifications.html
    # 233 TOPS INT8 of 160 vector engines at 2.85 GHz (B570: 10 GB at 380 GB/s)
    "xe20.1": _Reference(
        "Arc B580 specifications",
        160,
        {"float64": 0.91, "float32": 14.6, "float16": 116.7, "bfloat16": 116.7, "int8": 233.5},
        ((11, 0.456e12), (0, 0.38e12)),
    ),
}


def arch_of(architecture: int) -> str:
    """Return the arch of SYCL's architecture number; `xe` alone where there is none.

    The number holds the IP version above its low byte: release in bits 22 and up, 8 bits of version from bit 14.
    """
    version = architecture >> 8
    return f"xe{version >> 22}.{version >> 14 & 0xFF}" if version > 0 else "xe"


def peak_rates(arch: str, *, vector_engines: int, memory_bytes: int) -> Rates:
    """Return the peak rates of a GPU; those of an architecture without a document are absent.

    Args:
        arch: As `arch_of` returns it.
        vector_engines: Of the device.
        memory_bytes: Its memory.
    """
    reference = _REFERENCES.get(arch)
    if reference is None:
        return Rates({}, 0.0, {})
    scale = min(1.0, vector_engines / reference.vector_engines)
    how = f"{reference.product} ({UNCHECKED}), scaled by {vector_engines}/{reference.vector_engines} vector engines"
    flops = {dtype: rate * 1e12 * scale for dtype, rate in reference.tflops.items()}
    sources = dict.fromkeys((f"peak_flops.{dtype}" for dtype in flops), how)
    bandwidth = next(rate for least, rate in reference.bandwidth if memory_bytes / 1e9 >= least)
    sources["bandwidth_bytes_per_s"] = f"{reference.product} ({UNCHECKED})"
    return Rates(flops, bandwidth, sources)
