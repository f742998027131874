"""Peak rates and abilities of AMD GPUs by LLVM target, from the vendor's documents.

Dense rates (no structured sparsity) of the matrix cores. A rate is that of the largest product of its target, scaled by
compute units and, where products differ in it, by the clock; never above the product's own. Upper bounds, all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Rates", "features", "last_level_cache_bytes", "peak_rates"]


UNCHECKED = "figure not yet held against the document"


@dataclass(frozen=True, slots=True)
class Rates:
    """Peak rates: operations a second by dtype name, bytes a second, and where each comes from."""

    flops: dict[str, float]
    bandwidth_bytes_per_s: float
    sources: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Reference:
    """The largest product of a target.

    Attributes:
        product: The product and the document.
        compute_units: As HIP counts them: of RDNA, workgroup processors of two.
        clock_khz: Peak engine clock where products of the target differ in it; 0 where they do not.
        tflops: By dtype name.
        bandwidth: Bytes a second by the least memory (1e9 bytes; 192 GB of HBM are 206) of a product, largest first.
        cache_mb: Last-level cache beside the L2 that HIP tells of (Infinity Cache); 0 for none.
    """

    product: str
    compute_units: int
    clock_khz: int
    tflops: dict[str, float]
    bandwidth: tuple[tuple[float, float], ...]
    cache_mb: int


_REFERENCES: dict[str, _Reference] = {
    # https://www.amd.com/content/dam/amd/en/documents/instinct-business-docs/product-briefs/instinct-mi250x-datasheet.pdf
    # A card is two devices of 110 compute units with half of the 3.28 TB/s each; the MI210 is one of 104.
    "gfx90a": _Reference(
        "MI250X data sheet",
        220,
        0,
        {"float64": 95.7, "float32": 95.7, "float16": 383.0, "bfloat16": 383.0, "int8": 383.0},
        ((0, 1.6384e12),),
        0,
    ),
    # https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets/amd-instinct-mi300x-data-sheet.pdf
    # https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/product-briefs/instinct-mi325x-datasheet.pdf
    # (same rates, 256 GB at 6 TB/s). FP8 is E4M3 FNUZ, not OCP's.
    "gfx942": _Reference(
        "MI300X and MI325X data sheets",
        304,
        0,
        {
            "float64": 163.4,
            "float32": 163.4,
            "tf32": 653.7,
            "float16": 1307.4,
            "bfloat16": 1307.4,
            "float8_e4m3fnuz": 2614.9,
            "int8": 2614.9,
        },
        ((230, 6.0e12), (0, 5.3e12)),
        256,
    ),
    # https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/product-briefs/amd-instinct-mi355x-gpu-brochure.pdf
    # https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/product-briefs/amd-instinct-mi350x-gpu-brochure.pdf
    # (2200 MHz). FP8 is OCP's E4M3.
    "gfx950": _Reference(
        "MI355X data sheet",
        256,
        2_400_000,
        {
            "float64": 78.6,
            "float32": 157.3,
            "float16": 2516.6,
            "bfloat16": 2516.6,
            "float8_e4m3fn": 5033.2,
            "int8": 5033.2,
            "mxfp6": 10066.3,
            "mxfp4": 10066.3,
        },
        ((0, 8.0e12),),
        256,
    ),
    # https://www.amd.com/en/products/graphics/desktops/radeon/7000-series/amd-radeon-rx-7900xtx.html
    # (96 compute units in 48 workgroup processors; 7900 XT: 20 GB at 0.8 TB/s)
    "gfx1100": _Reference(
        "Radeon RX 7900 XTX product page",
        48,
        0,
        {"float64": 1.92, "float32": 61.4, "float16": 122.8, "bfloat16": 122.8, "int8": 122.8, "int4": 245.6},
        ((22, 0.96e12), (0, 0.8e12)),
        96,
    ),
}

_FEATURES: dict[str, tuple[str, ...]] = {
    "gfx908": ("bf16", "mfma"),
    "gfx90a": ("bf16", "mfma"),
    "gfx942": ("bf16", "fp8_fnuz", "mfma"),
    "gfx950": ("bf16", "fp8", "mfma", "mxfp4", "mxfp6", "mxfp8"),
    "gfx1100": ("bf16", "wmma"),
    "gfx1101": ("bf16", "wmma"),
    "gfx1200": ("bf16", "fp8", "wmma"),
    "gfx1201": ("bf16", "fp8", "wmma"),
}
"""By target, `AMDGPU usage` and the ISA documents: matrix instructions `v_mfma_*` and `v_wmma_*` and their formats."""


def peak_rates(arch: str, *, compute_units: int, clock_khz: int, memory_bytes: int) -> Rates:
    """Return the peak rates of a GPU; those of a target without a document are absent.

    Args:
        arch: LLVM target without its features: `gfx942`.
        compute_units: Of the device (of a partition, its own).
        clock_khz: Its highest clock; 0 where HIP does not tell.
        memory_bytes: Its memory.
    """
    reference = _REFERENCES.get(arch)
    if reference is None:
        return Rates({}, 0.0, {})
    scale = min(1.0, compute_units / reference.compute_units)
    how = f"{reference.product} ({UNCHECKED}), scaled by {compute_units}/{reference.compute_units} compute units"
    if reference.clock_khz and clock_khz:
        scale *= min(1.0, clock_khz / reference.clock_khz)
        how += f" and {clock_khz / 1000:.0f}/{reference.clock_khz / 1000:.0f} MHz"
    flops = {dtype: rate * 1e12 * scale for dtype, rate in reference.tflops.items()}
    sources = dict.fromkeys((f"peak_flops.{dtype}" for dtype in flops), how)
    # HIP's memory clock is no help: for HBM3 twice clock times bus is half of the data sheet's bandwidth.
    bandwidth = next(rate for least, rate in reference.bandwidth if memory_bytes / 1e9 >= least)
    sources["bandwidth_bytes_per_s"] = f"{reference.product} ({UNCHECKED})"
    return Rates(flops, bandwidth, sources)


def features(arch: str) -> tuple[str, ...]:
    """Return what a target can do in hardware, sorted; of one that is not known, what every ROCm GPU can."""
    known = _FEATURES.get(arch, ())
    return tuple(sorted({"cuda_graphs", "fp16", "rocm", *known, *(("triton",) if known else ())}))


def last_level_cache_bytes(arch: str) -> int:
    """Return the bytes of the Infinity Cache, of which HIP does not tell; 0 where there is none or it is not known."""
    reference = _REFERENCES.get(arch)
    return 0 if reference is None else reference.cache_mb << 20
