"""Casts to block formats: the definition against the formats' own rules, and under the interpreter the kernel."""

from __future__ import annotations

import pytest
import torch

from kernel_pytorch.core.types import Skip
from kernel_pytorch.errors import InputsError
from kernel_pytorch.ops.block_cast import BLOCK_FORMATS, block_cast, dequantised, unsupported
from kernel_pytorch.ops.block_cast.reference import block_cast_reference, e2m1_codes, e2m1_values

from .conftest import run_interpreted
from .test_float8_cast import misrounded

NAMES = list(BLOCK_FORMATS)


def test_kernels_under_the_interpreter() -> None:
    run_interpreted(__file__)


def spread(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return values whose rows and columns are of very different size, with a block of zeros."""
    torch.manual_seed(0)
    x = torch.randn(rows, columns) * torch.logspace(-3, 3, rows)[:, None] * torch.logspace(-2, 2, columns)[None, :]
    x[: rows // 2, : columns // 2] = 0.0
    return x.to(dtype)


def test_e2m1_has_eight_sizes_and_ties_go_to_even() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = e2m1_values(codes)
    assert values[:8].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert torch.equal(e2m1_codes(values), codes)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 99.0, -2.5])
    assert e2m1_values(e2m1_codes(ties)).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -2.0]


@pytest.mark.parametrize("name", NAMES)
def test_elements_are_the_nearest_under_their_scale(name) -> None:
    kind = BLOCK_FORMATS[name]
    x = spread(256, 256)
    cast = block_cast(x, name)
    back = dequantised(cast, kind)
    wide = cast.scales.float().double() * cast.whole.double()
    wide = wide.repeat_interleave(kind.rows, 0).repeat_interleave(kind.columns, 1)
    ratio = (x.double() / wide).nan_to_num(0.0).abs()
    # Half a step of the element's format at its size: three bits of mantissa, or one.
    bits, least = (1, 0.5) if kind.element == "e2m1" else (3, 2.0**-9)
    step = torch.maximum(2.0 ** (torch.floor(torch.log2(ratio.clamp_min(1e-30))) - bits), torch.tensor(least))
    fits = ratio <= kind.limit * (1 + 1e-6)
    assert ((back - x.double()).abs() <= step / 2 * wide * (1 + 1e-6))[fits & (wide > 0)].all()
    assert not back[:128, :128].any()
    # A scale of E4M3 is itself rounded, down too: then the largest elements of a block saturate.
    assert fits[wide > 0].double().mean() > (0.9 if kind.scale == "e4m3" else 0.999999)


def test_scales_of_mxfp8_are_the_least_powers_that_fit() -> None:
    x = spread(64, 64)
    cast = block_cast(x, "mxfp8")
    assert cast.scales.dtype is torch.float8_e8m0fnu
    amax = x.view(64, 2, 32).abs().amax(2)
    scale = cast.scales.float()
    used = amax > 0
    assert (amax / scale <= 448)[used].all()
    assert (amax / (scale / 2) > 448)[used].all()
    exact = torch.zeros(1, 32)
    exact[0, 0] = 448.0 * 4
    assert float(block_cast(exact, "mxfp8").scales.float()) == 4.0


def test_nvfp4_uses_the_range_of_its_scales() -> None:
    cast = block_cast(spread(64, 64), "nvfp4")
    assert cast.elements.shape == (64, 32)
    assert cast.scales.dtype is torch.float8_e4m3fn
    assert float(cast.scales.float().max()) == 448.0
    assert float(cast.whole) == pytest.approx(float(spread(64, 64).abs().max()) / (6 * 448), rel=1e-6)


@pytest.mark.parametrize(("name", "worst"), [("fp8_1x128", 0.04), ("mxfp8", 0.04), ("nvfp4", 0.14)])
def test_the_error_is_that_of_the_formats(name, worst) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 256)
    error = float((dequantised(block_cast(x, name), BLOCK_FORMATS[name]) - x).norm() / x.norm())
    assert worst / 3 < error < worst


def test_blocks_keep_small_rows_that_one_scale_loses() -> None:
    x = torch.randn(128, 128) * torch.logspace(-9, 0, 128)[:, None]
    rows = (dequantised(block_cast(x, "fp8_1x128"), BLOCK_FORMATS["fp8_1x128"]) - x).norm(dim=1) / x.norm(dim=1)
    square = (dequantised(block_cast(x, "fp8_128x128"), BLOCK_FORMATS["fp8_128x128"]) - x).norm(dim=1) / x.norm(dim=1)
    assert rows.max() < 0.05
    assert float(square[0]) == pytest.approx(1.0, abs=1e-6)


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(InputsError, match="no block format is called 'fp3'"):
        block_cast(torch.ones(2, 32), "fp3")
    with pytest.raises(InputsError, match="blocks of 1 x 32 divide"):
        block_cast(torch.ones(2, 33), "mxfp8")
    assert isinstance(unsupported(torch.ones(2, 32).double(), "mxfp8"), Skip)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_is_the_definition(name, dtype, interpreter) -> None:
    kind = BLOCK_FORMATS[name]
    x = spread(128 if kind.rows == 128 else 5, 256, dtype)
    assert unsupported(x, name) is None
    got, want = block_cast(x, name), block_cast_reference(x, kind)
    assert torch.equal(got.whole, want.whole)
    # The interpreter rounds FP8 otherwise than GPUs do in the middle and below the least normal number: `misrounded`.
    if kind.scale == "e4m3":
        amax = x.float().view(len(x), -1, kind.columns).abs().amax(2)
        assert misrounded(got.scales, amax / (kind.limit * got.whole)) == 0
    else:
        assert torch.equal(got.scales.view(torch.uint8), want.scales.view(torch.uint8))
    wide = (got.scales.float() * got.whole).repeat_interleave(kind.rows, 0).repeat_interleave(kind.columns, 1)
    exact = torch.where(wide > 0, x.float() / wide, 0.0).clamp(-kind.limit, kind.limit)
    if kind.element == "e2m1":
        codes = e2m1_codes(exact)
        assert torch.equal(got.elements, codes[:, ::2] | (codes[:, 1::2] << 4))
    else:
        assert misrounded(got.elements, exact) == 0
