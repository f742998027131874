# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, operator"
# ruff: noqa: ANN001, ANN202, C901, FBT003, N803, PLR0912, PLR0915, PLR0917
"""Triton kernel of cross-entropy over logits: a row is one program, which keeps a running maximum and sum.

With both `LOSS` and `GRAD` a row is read twice and written once, where the second read finds most of it in L2; the
gradient may take the place of the logits. All arithmetic is fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernel_pytorch._triton.launch import next_power_of_2, on_device_of
from kernel_pytorch._triton.targets import CompileCase

__all__ = ["COMPILE_CASES", "launch"]

_LOG2_E = 1.4426950408889634


@triton.jit
def _capped(x, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        x = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)
    return x


@triton.jit
def _absorb(x, most, total, whole, log2_e, SMOOTHING: tl.constexpr):
    """Take a tile `[LANES, WIDTH]` into the running maximum, sum of exponentials and plain sum of each lane."""
    new = tl.maximum(most, tl.max(x, axis=1))
    total = total * tl.exp2((most - new) * log2_e) + tl.sum(tl.exp2((x - new[:, None]) * log2_e), axis=1)
    if SMOOTHING:
        whole = whole + tl.sum(x, axis=1)
    return new, total, whole


@triton.jit
def _slope(x, column, label, lse, hit, floor, scale, softcap, log2_e, SOFTCAP: tl.constexpr):
    """Return the gradient of a tile: softmax minus the target distribution, times what comes from outside."""
    x = _capped(x, softcap, SOFTCAP)
    d = tl.exp2((x - lse) * log2_e) - floor
    d = tl.where(column == label, d - hit, d) * scale
    if SOFTCAP:
        t = x / softcap
        d = d * (1.0 - t * t)
    return d


@triton.jit
def cross_entropy_kernel(
    logits_ptr,
    gradient_ptr,
    labels_ptr,
    losses_ptr,
    lse_ptr,
    scale_ptr,
    row_scale_ptr,
    logits_stride,
    gradient_stride,
    columns,
    ignore_index,
    smoothing,
    softcap,
    log2_e,
    LOSS: tl.constexpr,
    GRAD: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * logits_stride
    label = tl.load(labels_ptr + row)
    used = label != ignore_index
    valid = used & (label >= 0) & (label < columns)
    tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    # A row that is ignored has no loss, and its logits are not read.
    length = tl.where(used, columns, 0)
    whole_tiles = length // (LANES * WIDTH) * (LANES * WIDTH)

    if LOSS:
        most = tl.full([LANES], -1.0e30, tl.float32)
        total = tl.zeros([LANES], tl.float32)
        whole = tl.zeros([LANES], tl.float32)
        for start in range(0, whole_tiles, LANES * WIDTH):
            x = _capped(tl.load(logits + start + tile).to(tl.float32), softcap, SOFTCAP)
            most, total, whole = _absorb(x, most, total, whole, log2_e, SMOOTHING)
        if whole_tiles < length:
            mask = whole_tiles + tile < length
            x = _capped(tl.load(logits + whole_tiles + tile, mask=mask, other=0.0).to(tl.float32), softcap, SOFTCAP)
            if SMOOTHING:
                whole = whole + tl.sum(tl.where(mask, x, 0.0), axis=1)
            most, total, _ = _absorb(tl.where(mask, x, float("-inf")), most, total, whole, log2_e, False)
        peak = tl.max(most, axis=0)
        log_total = tl.log(tl.where(used, tl.sum(total * tl.exp2((most - peak) * log2_e), axis=0), 1.0))
        lse = peak + log_total
        target = _capped(tl.load(logits + tl.where(valid, label, 0)).to(tl.float32), softcap, SOFTCAP)
        # Differences of logits first: they are exact where the logits are large and near each other.
        loss = tl.where(valid, (peak - target) + log_total, float("nan"))
        if SMOOTHING:
            loss = loss * (1.0 - smoothing) + smoothing * ((peak - tl.sum(whole, axis=0) / columns) + log_total)
        tl.store(losses_ptr + row, tl.where(used, loss, 0.0))
        if not GRAD:
            tl.store(lse_ptr + row, lse)
    else:
        lse = tl.load(lse_ptr + row)

    if GRAD:
        gradient = gradient_ptr + row * gradient_stride
        scale = tl.load(scale_ptr)
        if row_scale_ptr is not None:
            scale = scale * tl.load(row_scale_ptr + row)
        hit = 1.0 - smoothing
        floor = smoothing / columns
        kind = gradient_ptr.dtype.element_ty
        if used:
            for start in range(0, whole_tiles, LANES * WIDTH):
                x = tl.load(logits + start + tile).to(tl.float32)
                d = _slope(x, start + tile, label, lse, hit, floor, scale, softcap, log2_e, SOFTCAP)
                tl.store(gradient + start + tile, d.to(kind))
            if whole_tiles < length:
                mask = whole_tiles + tile < length
                x = tl.load(logits + whole_tiles + tile, mask=mask, other=float("-inf")).to(tl.float32)
                d = _slope(x, whole_tiles + tile, label, lse, hit, floor, scale, softcap, log2_e, SOFTCAP)
                tl.store(gradient + whole_tiles + tile, d.to(kind), mask=mask)
        else:
            zero = tl.zeros([LANES, WIDTH], tl.float32).to(kind)
            for start in range(0, columns, LANES * WIDTH):
                tl.store(gradient + start + tile, zero, mask=start + tile < columns)


@triton.jit
def scale_kernel(x_ptr, scale_ptr, n, BLOCK: tl.constexpr):
    """Multiply in place by a number on the device; where it is one, nothing is read or written."""
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < n, other=0.0)
        tl.store(x_ptr + at, (x.to(tl.float32) * scale).to(x.dtype), mask=at < n)


def launch(
    logits: torch.Tensor,
    labels: torch.Tensor,
    losses: torch.Tensor | None,
    lse: torch.Tensor | None,
    gradient: torch.Tensor | None,
    *,
    scale: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    ignore_index: int = -100,
    smoothing: float = 0.0,
    softcap: float = 0.0,
    num_warps: int = 0,
) -> None:
    """Compute losses, gradients, or both, of rows.

    Args:
        logits: `[rows, columns]`, elements of a row adjacent.
        labels: `[rows]` int64, contiguous. One out of range that is not `ignore_index` gives a loss of NaN.
        losses: `[rows]` fp32, written; 0 for a row that is ignored. `None`: only gradients, from `lse`.
        lse: `[rows]` fp32, log of the sum of exponentials: written with losses alone, read with gradients alone.
        gradient: Like `logits`, and possibly `logits` itself; written. `None`: only losses.
        scale: One fp32 number on the device that gradients are multiplied by; with `gradient`.
        row_scale: `[rows]` fp32, likewise by row.
        ignore_index: Label of rows without loss.
        smoothing: Share of the target that is spread over all columns.
        softcap: Logits are `softcap * tanh(logits / softcap)`; 0 is none.
        num_warps: Warps a program; 0 chooses by the length of a row.
    """
    rows, columns = logits.shape
    if not rows:
        return
    width = 16 // logits.dtype.itemsize
    warps = num_warps or max(1, min(16, next_power_of_2(columns) // (32 * width)))
    with on_device_of(logits):
        cross_entropy_kernel[(rows,)](
            logits, gradient, labels, losses, lse, scale, row_scale,
            logits.stride(0), 0 if gradient is None else gradient.stride(0), columns,
            ignore_index, smoothing, softcap, _LOG2_E,
            losses is not None, gradient is not None, smoothing > 0, softcap > 0, 32 * warps, width, num_warps=warps,
        )  # fmt: skip


def scale_(x: torch.Tensor, scale: torch.Tensor) -> None:
    """Multiply a contiguous tensor in place by one number on the device, without waiting for it."""
    if x.numel():
        with on_device_of(x):
            scale_kernel[(triton.cdiv(x.numel(), 8192),)](x, scale, x.numel(), 8192, num_warps=8)


def _case(label: str, kind: str, *, loss: bool, grad: bool, **options: bool) -> CompileCase:
    floats = ("smoothing", "softcap", "log2_e")
    width = 8 if kind == "bf16" else 4
    pointers = {"logits_ptr": f"*{kind}", "labels_ptr": "*i64"}
    absent: dict[str, object] = {"row_scale_ptr": None}
    for name, used, what in (
        ("gradient_ptr", grad, f"*{kind}"),
        ("scale_ptr", grad, "*fp32"),
        ("losses_ptr", loss, "*fp32"),
        ("lse_ptr", loss != grad, "*fp32"),
    ):
        if used:
            pointers[name] = what
        else:
            absent[name] = None
    integers = dict.fromkeys(("logits_stride", "gradient_stride", "columns", "ignore_index"), "i32")
    flags = {"SMOOTHING": False, "SOFTCAP": False, **options}
    return CompileCase(
        cross_entropy_kernel,
        {**pointers, **integers, **dict.fromkeys(floats, "fp32")},
        {**absent, **flags, "LOSS": loss, "GRAD": grad, "LANES": 512, "WIDTH": width},
        num_warps=16,
        divisible=(*pointers, "logits_stride", "gradient_stride", "columns"),
        label=label,
    )


COMPILE_CASES: list[CompileCase] = [
    _case("both", "bf16", loss=True, grad=True),
    _case("loss", "bf16", loss=True, grad=False),
    _case("grad", "fp32", loss=False, grad=True, SMOOTHING=True, SOFTCAP=True),
    CompileCase(scale_kernel, {"x_ptr": "*bf16", "scale_ptr": "*fp32", "n": "i32"}, {"BLOCK": 8192}, num_warps=8),
]
