"""Peak rates and abilities of NVIDIA GPUs by compute capability, from the vendor's documents.

Dense rates (no structured sparsity), products with fp32 accumulation where the document tells it apart. A rate is
that of a reference product, scaled by the number of multiprocessors and, where products of one arch differ in it,
by the clock. A part with a lower power limit or clock than the reference reaches less: these are upper bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Rates", "features", "of_slice", "peak_rates"]

_MEMORY_SLICES = 8
"""A MIG-capable GPU divides its memory, with the bandwidth to it, into eighths (MIG user guide, `1g` to `7g`)."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Peak rates: operations a second by dtype name, bytes a second, and where each comes from."""

    flops: dict[str, float]
    bandwidth_bytes_per_s: float
    sources: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Reference:
    """A product whose data sheet gives the rates of its arch.

    Attributes:
        product: The product and the document.
        multiprocessors: Of the product.
        clock_khz: Boost clock of the data sheet where rates are scaled by clock too; 0 where they are not.
        tflops: By dtype name.
        bandwidth: Bytes a second by the least memory a product has to have, largest first.
    """

    product: str
    multiprocessors: int
    clock_khz: int
    tflops: dict[str, float]
    bandwidth: tuple[tuple[float, float], ...]


_REFERENCES: dict[tuple[int, int], _Reference] = {
    # https://images.nvidia.com/content/technologies/volta/pdf/tesla-volta-v100-datasheet-letter-fnl-web.pdf
    (7, 0): _Reference(
        "V100 SXM2 data sheet",
        80,
        0,
        {"float64": 7.8, "float32": 15.7, "float16": 125.0},
        ((0, 0.9e12),),
    ),
    # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf
    (7, 5): _Reference(
        "T4 data sheet",
        40,
        1_590_000,
        {"float64": 0.25, "float32": 8.1, "float16": 65.0, "int8": 130.0, "int4": 260.0},
        ((0, 0.32e12),),
    ),
    # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
    (8, 0): _Reference(
        "A100 SXM data sheet",
        108,
        0,
        {"float64": 19.5, "float32": 19.5, "tf32": 156.0, "float16": 312.0, "bfloat16": 312.0, "int8": 624.0},
        ((70, 2.039e12), (0, 1.555e12)),
    ),
    # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a10/pdf/datasheet-new/nvidia-a10-datasheet.pdf
    (8, 6): _Reference(
        "A10 data sheet",
        72,
        1_695_000,
        {"float64": 0.49, "float32": 31.2, "tf32": 62.5, "float16": 125.0, "bfloat16": 125.0, "int8": 250.0},
        ((40, 0.696e12), (0, 0.6e12)),
    ),
    # https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413 (L4, of the same arch, agrees by clock and count)
    (8, 9): _Reference(
        "L40S data sheet",
        142,
        2_520_000,
        {
            "float64": 1.4,
            "float32": 91.6,
            "tf32": 183.0,
            "float16": 362.0,
            "bfloat16": 362.0,
            "float8_e4m3fn": 733.0,
            "int8": 733.0,
        },
        ((40, 0.864e12), (0, 0.3e12)),
    ),
    # https://resources.nvidia.com/en-us-hopper-architecture/nvidia-tensor-core-gpu-datasheet (H100) and
    # https://resources.nvidia.com/en-us-data-center-overview/hpc-datasheet-sc23-h200 (H200: same rates, 4.8 TB/s)
    (9, 0): _Reference(
        "H100 and H200 SXM data sheets",
        132,
        0,
        {
            "float64": 67.0,
            "float32": 67.0,
            "tf32": 494.5,
            "float16": 989.5,
            "bfloat16": 989.5,
            "float8_e4m3fn": 1979.0,
            "int8": 1979.0,
        },
        ((120, 4.8e12), (90, 4.0e12), (0, 3.35e12)),
    ),
    # https://resources.nvidia.com/en-us-blackwell-architecture/blackwell-architecture-technical-brief (HGX B200)
    (10, 0): _Reference(
        "HGX B200, Blackwell architecture technical brief",
        148,
        0,
        {
            "float64": 40.0,
            "float32": 80.0,
            "tf32": 1125.0,
            "float16": 2250.0,
            "bfloat16": 2250.0,
            "float8_e4m3fn": 4500.0,
            "int8": 4500.0,
            "nvfp4": 9000.0,
        },
        ((0, 8.0e12),),
    ),
    # https://www.nvidia.com/en-us/data-center/hgx/ (HGX B300: FP4 up by half, INT8 and FP64 cut)
    (10, 3): _Reference(
        "HGX B300 product page",
        148,
        0,
        {
            "float64": 1.3,
            "float32": 80.0,
            "tf32": 1250.0,
            "float16": 2500.0,
            "bfloat16": 2500.0,
            "float8_e4m3fn": 5000.0,
            "int8": 165.0,
            "nvfp4": 15000.0,
        },
        ((0, 8.0e12),),
    ),
    # https://www.nvidia.com/content/dam/en-zz/Solutions/design-visualization/quadro-product-literature/
    # NVIDIA-RTX-Blackwell-PRO-GPU-Architecture-v1.0.pdf
    (12, 0): _Reference(
        "RTX PRO 6000, RTX Blackwell PRO architecture white paper",
        188,
        2_617_000,
        {
            "float64": 1.97,
            "float32": 126.0,
            "tf32": 252.0,
            "float16": 503.8,
            "bfloat16": 503.8,
            "float8_e4m3fn": 1007.6,
            "int8": 1007.6,
            "nvfp4": 2015.2,
        },
        ((0, 1.792e12),),
    ),
    # https://www.nvidia.com/en-us/products/workstations/dgx-spark/ (GB10: 1000 FP4 with sparsity; 273 GB/s of LPDDR5x;
    # the other rates in the proportions of sm_120)
    (12, 1): _Reference(
        "DGX Spark product page",
        48,
        0,
        {
            "float64": 0.488,
            "float32": 31.25,
            "tf32": 62.5,
            "float16": 125.0,
            "bfloat16": 125.0,
            "float8_e4m3fn": 250.0,
            "int8": 250.0,
            "nvfp4": 500.0,
        },
        ((0, 0.273e12),),
    ),
}


def peak_rates(
    capability: tuple[int, int],
    *,
    multiprocessors: int,
    clock_khz: int,
    memory_bytes: int,
    memory_clock_khz: int,
    memory_bus_bits: int,
) -> Rates:
    """Return the peak rates of a GPU; those of an unknown arch are absent, except what the driver tells.

    Args:
        capability: Compute capability.
        multiprocessors: Streaming multiprocessors of the device.
        clock_khz: Its highest clock; 0 where the driver does not tell.
        memory_bytes: Its memory.
        memory_clock_khz: Memory clock; 0 where the driver does not tell.
        memory_bus_bits: Width of the memory bus; 0 where the driver does not tell.
    """
    reference = _REFERENCES.get(capability)
    flops: dict[str, float] = {}
    sources: dict[str, str] = {}
    bandwidth = 0.0
    if reference is not None:
        scale = multiprocessors / reference.multiprocessors
        how = f"{reference.product}, scaled by {multiprocessors}/{reference.multiprocessors} multiprocessors"
        if reference.clock_khz and clock_khz:
            scale *= clock_khz / reference.clock_khz
            how += f" and {clock_khz / 1000:.0f}/{reference.clock_khz / 1000:.0f} MHz"
        flops = {dtype: rate * 1e12 * scale for dtype, rate in reference.tflops.items()}
        sources = dict.fromkeys((f"peak_flops.{dtype}" for dtype in flops), how)
        memory_gb = memory_bytes / 1e9
        bandwidth = next(rate for least, rate in reference.bandwidth if memory_gb >= least)
        sources["bandwidth_bytes_per_s"] = reference.product
    if memory_clock_khz and memory_bus_bits:
        # Two transfers a clock: the CUDA samples' deviceQuery and bandwidthTest compute it so.
        bandwidth = 2.0 * memory_clock_khz * 1e3 * memory_bus_bits / 8
        sources["bandwidth_bytes_per_s"] = "memory clock and bus width told by the driver"
    return Rates(flops, bandwidth, sources)


def of_slice(rates: Rates, memory_share: float) -> Rates:
    """Return the rates with the bandwidth of a MIG slice that has a share of the memory, rounded up to eighths.

    The rates of computation follow the slice's multiprocessors already.
    """
    if not rates.bandwidth_bytes_per_s:
        return rates
    eighths = min(_MEMORY_SLICES, max(1, math.ceil(_MEMORY_SLICES * memory_share - 0.25)))
    name = "bandwidth_bytes_per_s"
    sources = {**rates.sources, name: f"{rates.sources[name]}, {eighths}/{_MEMORY_SLICES} of it"}
    return Rates(rates.flops, rates.bandwidth_bytes_per_s * eighths / _MEMORY_SLICES, sources)


def features(capability: tuple[int, int]) -> tuple[str, ...]:
    """Return what an arch can do in hardware.

    `CUDA C++ Programming Guide`, compute capabilities; PTX ISA, `mma`, `wgmma` (sm_90 alone), `tcgen05` (sm_100,
    sm_103, and sm_110, which was sm_101) and `cp.async.bulk.tensor` (`tma`).
    """
    since: tuple[tuple[tuple[int, int], str], ...] = (
        ((5, 3), "fp16"),
        ((7, 0), "cuda_graphs"),
        ((7, 0), "tensor_cores"),
        ((7, 0), "triton"),
        ((7, 2), "int8_tensor_cores"),
        ((8, 0), "bf16"),
        ((8, 0), "tf32"),
        ((8, 9), "fp8"),
        ((9, 0), "tma"),
        ((10, 0), "mxfp4"),
        ((10, 0), "mxfp8"),
        ((10, 0), "nvfp4"),
    )
    found = [name for least, name in since if capability >= least]
    if capability == (9, 0):
        found.append("wgmma")
    if capability[0] in (10, 11):
        found.append("tcgen05")
    return tuple(sorted(found))
