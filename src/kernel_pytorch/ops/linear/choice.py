# ruff: noqa: PLR0917
"""Which algorithm of cuBLASLt computes a product: measured at its first use, and kept for the next process.

Under a power limit what counts is the energy of an algorithm, which shows only while the GPU is hot: so all are timed
in turns, in bursts of some ten milliseconds, after a warm-up, and the best three once more against PyTorch's own choice
on fresh samples. PyTorch's is replaced by what is at least 1 % faster there.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernel_pytorch.backends import manager_for
from kernel_pytorch.backends.nvidia import cublaslt
from kernel_pytorch.hardware import detect
from kernel_pytorch.measure.bursts import Bursts
from kernel_pytorch.measure.choices import choice_file, load_choices, store_choices
from kernel_pytorch.ops.linear.reference import product_reference

__all__ = ["forget", "measured_choices", "multiply", "multiply_float8"]

_log = logging.getLogger(__name__)

_LEAST_FLOPS = 8e9
"""Below about 12 us of an H200 launching costs more than an algorithm can save."""
_ROUNDS, _DUELS, _FINALISTS = 3, 7, 3
_LEAST_GAIN = 0.01
_AGREE = 1e-2
"""Relative difference between results of two right algorithms: both round to 16 bits once."""
_NONE = ""


@dataclass(slots=True)
class _Prepared:
    """A kind of product with the algorithm it runs by; without one PyTorch computes it."""

    product: cublaslt.Product | None = None
    algorithm: Any = None


_prepared: dict[tuple[Any, ...], _Prepared] = {}


def multiply(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, *, transpose_a: bool, transpose_b: bool
) -> torch.Tensor:
    """Return `op(a) @ op(b) + bias` by the measured algorithm, or by PyTorch where that is faster or the only way.

    Products below 8 GFLOP, with leading dimensions or addresses that 16 bytes do not divide, and those first met while
    a CUDA graph is captured (nothing can be measured then) are PyTorch's.

    Args:
        a: `[rows, inner]` or transposed, bfloat16 or float16, on an NVIDIA GPU.
        b: `[inner, columns]` or transposed, the same dtype.
        bias: `[columns]`, the same dtype.
        transpose_a: Whether `a` is `[inner, rows]`.
        transpose_b: Whether `b` is `[columns, inner]`.
    """
    a, b = a.contiguous(), b.contiguous()
    if any(t.data_ptr() % cublaslt.ALIGNED for t in (a, b)):
        return product_reference(a, b, bias, transpose_a=transpose_a, transpose_b=transpose_b)
    key = (a.shape, b.shape, transpose_a, transpose_b, bias is None, a.dtype, a.device)
    known = _prepared.get(key)
    if known is None:
        known = _prepare(key, a, b, bias, transpose_a=transpose_a, transpose_b=transpose_b)
    if known.product is None:
        return product_reference(a, b, bias, transpose_a=transpose_a, transpose_b=transpose_b)
    out = a.new_empty((a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1]))
    known.product.compute(known.algorithm, a, b, out, None if bias is None else bias.contiguous())
    return out


def multiply_float8(
    a: torch.Tensor,
    b: torch.Tensor,
    inverse_a: torch.Tensor,
    inverse_b: torch.Tensor,
    *,
    dtype: torch.dtype,
    fast: bool,
) -> torch.Tensor:
    """Return `(a * inverse_a) @ (b * inverse_b).T` by the measured algorithm, or by PyTorch as `multiply` does.

    Args:
        a: FP8 `[rows, inner]`, contiguous; 16 divides `inner`.
        b: FP8 `[columns, inner]`, contiguous; at most one of both E5M2.
        inverse_a: Float32 `[1]`.
        inverse_b: Float32 `[1]`.
        dtype: Of the result; of others than bfloat16 and float16 the product is PyTorch's.
        fast: Sums in the tensor cores' own accumulators.
    """

    def plain() -> torch.Tensor:
        return torch._scaled_mm(  # noqa: SLF001  # PyTorch's only entry to cuBLASLt's products of FP8
            a, b.t(), scale_a=inverse_a, scale_b=inverse_b, out_dtype=dtype, use_fast_accum=fast
        )

    if dtype not in cublaslt.DTYPES or any(t.data_ptr() % cublaslt.ALIGNED for t in (a, b)):
        return plain()
    key = (a.shape, b.shape, a.dtype, b.dtype, dtype, fast, a.device)
    known = _prepared.get(key)
    if known is None:
        known = _prepare_float8(key, plain, a, b, inverse_a, inverse_b, dtype=dtype, fast=fast)
    if known.product is None:
        return plain()
    out = torch.empty((len(a), len(b)), dtype=dtype, device=a.device)
    known.product.compute(known.algorithm, a, b, out, None, (inverse_a, inverse_b))
    return out


def forget() -> None:
    """Forget what this process chose; the files stay."""
    _prepared.clear()
    _stored.cache_clear()


def measured_choices(device: torch.device | str = "cuda") -> dict[str, Any]:
    """Return what is known of a device: by product, the milliseconds of PyTorch's choice and of ours."""
    return dict(_stored(torch.device(device).index or 0)[1])


def _prepare(
    key: tuple[Any, ...],
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    transpose_a: bool,
    transpose_b: bool,
) -> _Prepared:
    rows, inner = a.shape[::-1] if transpose_a else a.shape
    columns = b.shape[0 if transpose_b else 1]
    wide = all(size * a.element_size() % cublaslt.ALIGNED == 0 for size in (a.shape[1], b.shape[1], columns))
    if 2.0 * rows * inner * columns < _LEAST_FLOPS or not wide:
        return _prepared.setdefault(key, _Prepared())
    if torch.cuda.is_current_stream_capturing():
        return _Prepared()
    index = a.device.index or 0
    product = cublaslt.Product(
        rows, columns, inner, transpose_a=transpose_a, transpose_b=transpose_b, dtype=a.dtype, device=index,
        bias=bias is not None,
    )  # fmt: skip
    name = (
        f"{rows}x{columns}x{inner} {'T' if transpose_a else 'N'}{'T' if transpose_b else 'N'} "
        f"{str(a.dtype).removeprefix('torch.')}{'' if bias is None else ' bias'}"
    )
    plain = functools.partial(product_reference, a, b, bias, transpose_a=transpose_a, transpose_b=transpose_b)
    return _prepared.setdefault(key, _chosen(product, name, plain, a, b, bias))


def _prepare_float8(
    key: tuple[Any, ...],
    plain: Callable[[], torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    *scales: torch.Tensor,
    dtype: torch.dtype,
    fast: bool,
) -> _Prepared:
    (rows, inner), columns, index = a.shape, len(b), a.device.index or 0
    item = dtype.itemsize
    wide = inner % cublaslt.ALIGNED == 0 and columns * item % cublaslt.ALIGNED == 0
    if 2.0 * rows * inner * columns < _LEAST_FLOPS or not wide:
        return _prepared.setdefault(key, _Prepared())
    if torch.cuda.is_current_stream_capturing():
        return _Prepared()
    formats = cublaslt.Float8(a.dtype, b.dtype, fast)
    product = cublaslt.Product(
        rows, columns, inner, transpose_a=False, transpose_b=True, dtype=dtype, device=index, float8=formats
    )
    names = [str(t).removeprefix("torch.float8_") for t in (a.dtype, b.dtype)]
    name = f"{rows}x{columns}x{inner} {' '.join(names)} {str(dtype).removeprefix('torch.')}{' fast' if fast else ''}"
    return _prepared.setdefault(key, _chosen(product, name, plain, a, b, None, scales))


def _chosen(
    product: cublaslt.Product,
    name: str,
    plain: Callable[[], torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    scales: tuple[torch.Tensor, ...] | None = None,
) -> _Prepared:
    """Return a product with the algorithm that is kept for it, measured where there is none."""
    path, choices = _stored(product.device)
    if name not in choices:
        choices[name] = _measure(product, plain, a, b, bias, scales)
        store_choices(path, {name: choices[name]}, _software(product.device))
    algorithm = bytes.fromhex(choices[name]["algorithm"])
    return _Prepared(product, cublaslt.buffer(algorithm)) if algorithm else _Prepared()


def _software(index: int) -> dict[str, str]:
    spec = detect(f"cuda:{index}")
    versions = {name: spec.software[name] for name in ("torch", "driver") if name in spec.software}
    return {"device": spec.name, "cublaslt": cublaslt.library_version(), **versions}


@functools.cache
def _stored(index: int) -> tuple[Path, dict[str, Any]]:
    path = choice_file("linear", detect(f"cuda:{index}").key, _software(index))
    return path, load_choices(path)


def _measure(
    product: cublaslt.Product,
    plain: Callable[[], torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    bias: Any,
    scales: Any = None,
) -> dict[str, Any]:
    """Time the algorithms in turns and return the entry of the file: the winner, or none where PyTorch's is as good."""
    want = plain()
    out = torch.empty_like(want)
    runs: dict[str, Callable[[], Any]] = {}
    with manager_for(f"cuda:{product.device}").exclusive(), torch.no_grad():
        for algorithm in product.algorithms:
            run = functools.partial(product.compute, cublaslt.buffer(algorithm), a, b, out, bias, scales)
            try:
                run()
            except cublaslt.CublasLtError as error:
                _log.info("%s", error)
                continue
            if _relative(out, want) <= _AGREE:
                runs[algorithm.hex()] = run
        del want
        if not runs:
            return {"algorithm": _NONE, "pytorch_ms": 0.0, "ms": 0.0, "candidates": 0}
        burst = Bursts(plain)
        first = burst.in_turns(runs, _ROUNDS)
        best = sorted(runs, key=lambda name: first[name])[:_FINALISTS]
        last = burst.in_turns({_NONE: plain, **{name: runs[name] for name in best}}, _DUELS)
    winner = min(best, key=lambda name: last[name])
    chosen = winner if last[winner] <= (1.0 - _LEAST_GAIN) * last[_NONE] else _NONE
    return {"algorithm": chosen, "pytorch_ms": last[_NONE], "ms": last[chosen], "candidates": len(runs)}


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the relative difference on a sample of rows: a whole product of gigabytes has no room for float32."""
    step = max(1, len(want) // 1024)
    size = want[::step].float()
    return float((got[::step].float() - size).norm() / size.norm().clamp_min(1e-30))
