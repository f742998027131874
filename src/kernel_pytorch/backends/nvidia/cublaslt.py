# ruff: noqa: PLR0917
"""cuBLASLt's matrix products with a choice of algorithm, through the very library that PyTorch has loaded.

`torch.mm` takes the first algorithm that cuBLASLt's heuristic proposes. At the power limit of a GPU others of its list
are faster, for they need less energy (H200, products of a Llama-3-8B training step: 325 instead of 339 ms). The C
interface is that of https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import byref, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernel_pytorch.core.types import Skip

__all__ = ["DTYPES", "FLOAT8", "Float8", "Product", "library_version", "unavailable"]

DTYPES = {torch.bfloat16: 14, torch.float16: 2}
"""`cudaDataType_t` of what is multiplied here."""
FLOAT8 = {torch.float8_e4m3fn: 28, torch.float8_e5m2: 29}
"""The same of operands with a scale each, at most one of them E5M2."""
_FLOAT32, _COMPUTE_32F = 0, 68
_TRANSPOSE_A, _TRANSPOSE_B, _EPILOGUE, _BIAS_POINTER = 3, 4, 7, 8
_SCALE_A, _SCALE_B, _FAST_SUMS = 17, 18, 25
_EPILOGUE_BIAS = 4
_WORKSPACE, _REDUCTION_MASK, _ALIGNMENT = 1, 3, (5, 6, 7, 8)
_REDUCE_IN_FLOAT32 = 1 | 2
"""In place or in the type of the accumulator: partial sums are never rounded to 16 bits."""
WORKSPACE_BYTES = 64 << 20
ALIGNED = 16
_RESULT_BYTES, _ALGORITHM_BYTES = 96, 64
_MOST = 32


class CublasLtError(RuntimeError):
    """cuBLASLt refused a call."""


@functools.cache
def _library() -> ctypes.CDLL:
    """Return the library that PyTorch's products run in.

    Raises:
        CublasLtError: The process has none.
    """
    torch.zeros((1, 1), device="cuda") @ torch.zeros((1, 1), device="cuda")
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    paths = dict.fromkeys(line.split(maxsplit=5)[-1] for line in maps.splitlines() if "libcublasLt.so" in line)
    if not paths:
        raise CublasLtError("PyTorch has not loaded cuBLASLt as a library of its own")
    return ctypes.CDLL(next(iter(paths)))


def unavailable() -> Skip | None:
    """Return why cuBLASLt cannot be called here; `None` where it can."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return Skip("cuBLASLt needs an NVIDIA GPU and a CUDA build of PyTorch")
    try:
        _library()
    except (CublasLtError, OSError) as error:
        return Skip(f"cuBLASLt cannot be called: {error}")
    return None


def library_version() -> str:
    """Return the version of cuBLASLt, as a number in decimal."""
    version = _library().cublasLtGetVersion
    version.restype = c_size_t
    return str(version())


def _check(status: int, what: str) -> None:
    if status:
        raise CublasLtError(f"{what} returned status {status}")


@functools.cache
def _handle(device: int) -> c_void_p:
    handle = c_void_p()
    with torch.cuda.device(device):
        _check(_library().cublasLtCreate(byref(handle)), "cublasLtCreate")
    return handle


@functools.cache
def _workspace(device: int, stream: int) -> torch.Tensor:
    """Return scratch memory of one stream: products of two streams may run at once."""
    del stream
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=f"cuda:{device}")


@dataclass(frozen=True, slots=True)
class _Shape:
    rows: int
    columns: int
    inner: int
    transpose_a: bool
    transpose_b: bool


@dataclass(frozen=True, slots=True)
class Float8:
    """Operands of a product in FP8.

    Attributes:
        a: Format of the first.
        b: Format of the second.
        fast: Sums in the tensor cores' own accumulators.
    """

    a: torch.dtype
    b: torch.dtype
    fast: bool


class Product:
    """One kind of product, `op(a) @ op(b) (+ bias)` of dense row-major matrices, and the algorithms that compute it.

    Args:
        rows: Of the result.
        columns: Of the result.
        inner: What is summed over.
        transpose_a: `a` is `[inner, rows]` instead of `[rows, inner]`.
        transpose_b: `b` is `[columns, inner]` instead of `[inner, columns]`.
        dtype: Of operands and result, one of `DTYPES`; sums are float32.
        device: Index of the GPU.
        bias: Whether a `[columns]` vector is added.
        float8: The operands are in FP8 instead: `b` is transposed, `a` is not, and each has a scale.

    Attributes:
        algorithms: Opaque descriptions (64 bytes each), the one that cuBLASLt would take first.

    Raises:
        CublasLtError: There is no algorithm.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        inner: int,
        *,
        transpose_a: bool,
        transpose_b: bool,
        dtype: torch.dtype,
        device: int,
        bias: bool = False,
        float8: Float8 | None = None,
    ) -> None:
        lib, self.device, self.dtype, self.bias = _library(), device, dtype, bias
        self._shape = _Shape(rows, columns, inner, transpose_a, transpose_b)
        self._description = c_void_p()
        _check(lib.cublasLtMatmulDescCreate(byref(self._description), c_int(_COMPUTE_32F), c_int(_FLOAT32)), "create")
        # A row-major matrix is its transpose in columns, so the library multiplies op(b)^T by op(a)^T.
        self._attribute(_TRANSPOSE_A, c_int32(transpose_b))
        self._attribute(_TRANSPOSE_B, c_int32(transpose_a))
        if bias:
            self._attribute(_EPILOGUE, c_uint32(_EPILOGUE_BIAS))
        kinds = [DTYPES[dtype]] * 3
        if float8 is not None:
            assert transpose_b
            assert not transpose_a
            kinds[:2] = FLOAT8[float8.b], FLOAT8[float8.a]
            self._attribute(_FAST_SUMS, c_int8(float8.fast))
        first = (inner, columns) if transpose_b else (columns, inner)
        second = (rows, inner) if transpose_a else (inner, rows)
        shapes = (first, second, (columns, rows))
        self._layouts = [_layout(*shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]
        self.algorithms = self._ask()
        self._one, self._zero = c_float(1.0), c_float(0.0)
        self._run = lib.cublasLtMatmul

    def _attribute(self, name: int, value: Any) -> None:
        size = c_size_t(ctypes.sizeof(value))
        status = _library().cublasLtMatmulDescSetAttribute(self._description, c_int(name), byref(value), size)
        _check(status, "cublasLtMatmulDescSetAttribute")

    def _ask(self) -> list[bytes]:
        lib, preference = _library(), c_void_p()
        _check(lib.cublasLtMatmulPreferenceCreate(byref(preference)), "cublasLtMatmulPreferenceCreate")
        wishes: list[tuple[int, Any]] = [
            (_WORKSPACE, c_uint64(WORKSPACE_BYTES)),
            (_REDUCTION_MASK, c_uint32(_REDUCE_IN_FLOAT32)),
            *((which, c_uint32(ALIGNED)) for which in _ALIGNMENT),
        ]
        for name, value in wishes:
            size = c_size_t(ctypes.sizeof(value))
            status = lib.cublasLtMatmulPreferenceSetAttribute(preference, c_int(name), byref(value), size)
            _check(status, "cublasLtMatmulPreferenceSetAttribute")
        found, count = (c_uint8 * (_RESULT_BYTES * _MOST))(), c_int()
        a, b, c = self._layouts
        status = lib.cublasLtMatmulAlgoGetHeuristic(
            _handle(self.device), self._description, a, b, c, c, preference, c_int(_MOST), found, byref(count)
        )
        lib.cublasLtMatmulPreferenceDestroy(preference)
        _check(status, f"cublasLtMatmulAlgoGetHeuristic for {self._shape}")
        raw = bytes(found)
        return [raw[i * _RESULT_BYTES : i * _RESULT_BYTES + _ALGORITHM_BYTES] for i in range(count.value)]

    def compute(
        self,
        algorithm: Any,
        a: torch.Tensor,
        b: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None = None,
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Write the product into `out`, on the current stream.

        Args:
            algorithm: A buffer of 64 bytes, one of `algorithms` (see `buffer`).
            a: `[rows, inner]`, or transposed; contiguous, aligned to 16 bytes.
            b: `[inner, columns]`, or transposed; likewise.
            out: `[rows, columns]`; likewise.
            bias: `[columns]`, where the product was made with one.
            scales: Of `a` and `b` in FP8: float32, one number each, what they are multiplied by.

        Raises:
            CublasLtError: The library refuses it.
        """
        if scales is not None:
            self._attribute(_SCALE_A, c_void_p(scales[1].data_ptr()))
            self._attribute(_SCALE_B, c_void_p(scales[0].data_ptr()))
        if bias is not None:
            self._attribute(_BIAS_POINTER, c_void_p(bias.data_ptr()))
        stream = torch.cuda.current_stream(self.device).cuda_stream
        first, second, result = self._layouts
        status = self._run(
            _handle(self.device), self._description, byref(self._one), c_void_p(b.data_ptr()), first,
            c_void_p(a.data_ptr()), second, byref(self._zero), c_void_p(out.data_ptr()), result,
            c_void_p(out.data_ptr()), result, algorithm, c_void_p(_workspace(self.device, stream).data_ptr()),
            c_size_t(WORKSPACE_BYTES), c_void_p(stream),
        )  # fmt: skip
        if status:
            raise CublasLtError(f"cublasLtMatmul returned status {status} for {self._shape}")


def buffer(algorithm: bytes) -> Any:
    """Return an algorithm as `Product.compute` takes it."""
    return (c_uint8 * _ALGORITHM_BYTES).from_buffer_copy(algorithm)


def _layout(rows: int, columns: int, kind: int) -> c_void_p:
    layout = c_void_p()
    status = _library().cublasLtMatrixLayoutCreate(
        byref(layout), c_int(kind), c_uint64(rows), c_uint64(columns), c_int64(rows)
    )
    _check(status, "cublasLtMatrixLayoutCreate")
    return layout
