"""One way to write each kind of figure: three significant digits, the unit beside it."""

from __future__ import annotations

import math

from kernel_pytorch.core.types import Ratio

__all__ = [
    "clock",
    "count",
    "error",
    "interval",
    "milliseconds",
    "number",
    "percent",
    "rate",
    "seconds",
    "size",
    "times",
]

_MOST_TIMES = 1000.0
"""No machine makes a model a thousand times faster; an interval of two samples may still reach that far."""
_LEAST_TIMES = 0.01
"""Slower than this is no figure to compare: a tiny model whose threads wait for a busy core, say."""

_DECIMAL = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float) -> str:
    """Write a plain number with three significant digits."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -3:
        return f"{value:.2e}"
    if magnitude >= 3:
        return f"{round(value, 2 - magnitude):,.0f}"
    return f"{value:.{max(0, 2 - magnitude)}f}"


def times(value: float) -> str:
    """Write a speed-up: `2.84x`."""
    if value > _MOST_TIMES:
        return f"> {_MOST_TIMES:.0f}x"
    if value < _LEAST_TIMES:
        return f"< {_LEAST_TIMES}x"
    return f"{number(value)}x" if value >= 10 else f"{value:.2f}x"


def interval(ratio: Ratio) -> str:
    """Write a speed-up with its interval: `2.84x [2.79, 2.90]`."""
    low, high = (times(x).removesuffix("x") for x in (ratio.low, ratio.high))
    return f"{times(ratio.value)} [{low}, {high}]"


def milliseconds(value: float) -> str:
    """Write a short time given in milliseconds."""
    if 0 < abs(value) < 0.9995:
        return f"{number(value * 1e3)} us"
    return f"{number(value)} ms" if abs(value) < 1e4 else seconds(value / 1e3)


def seconds(value: float) -> str:
    """Write a time given in seconds."""
    if abs(value) < 0.9995:
        return f"{number(value * 1e3)} ms"
    return f"{number(value)} s" if abs(value) < 119.5 else clock(value)


def clock(value: float) -> str:
    """Write a time given in seconds as `3 min 40 s`."""
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(value: float) -> str:
    """Write bytes: `86.6 MiB`."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(value) >= unit:
            return f"{number(value / unit)} {name}"
    return f"{value:.0f} B"


def count(value: float, unit: str = "") -> str:
    """Write a large number with a decimal prefix: `22.7 M`, `11.2 GFLOP`."""
    for scale, prefix in _DECIMAL:
        if abs(value) >= scale:
            return f"{number(value / scale)} {prefix}{unit}"
    return f"{number(value)} {unit}".strip()


def rate(value: float, unit: str) -> str:
    """Write an amount a second: `1.2 TFLOP/s`."""
    return count(value, f"{unit}/s")


def percent(value: float) -> str:
    """Write a share."""
    if 0 < value < 0.0005:
        return "< 0.1 %"
    return f"{value * 100:.0f} %" if value >= 0.0995 or value == 0 else f"{value * 100:.1f} %"


def error(value: float) -> str:
    """Write a relative error: `1.1e-2`."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"
