"""How a step lies on the devices of a slice: shardings of its arguments, and of what it marked on the way.

XLA's own partitioner (GSPMD, Xu et al. 2021, arXiv:2105.04663) takes one program for all devices and splits it by these
annotations; the collectives follow from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from kernel_pytorch.backends.tpu.steps import Argument, Role

__all__ = ["LAYOUTS", "argument_shardings", "spread_marks"]

LAYOUTS = {
    "replicated": "every device holds all parameters (data parallel)",
    "sharded": "parameters and optimizer state are spread over the devices (fully sharded data parallel)",
}

REPLICATED = "{replicated}"
_LEAST = 1 << 14
"""Tensors of fewer elements stay whole: gathering them would cost more than it saves."""


def argument_shardings(arguments: Iterable[Argument], devices: int, layout: str) -> list[str]:
    """Return the `mhlo.sharding` of each argument.

    The batch is spread by its first dimension where that divides evenly. Sharded state is spread along its first
    dimension that the devices divide.

    Args:
        arguments: Of the step.
        devices: How many.
        layout: One of `LAYOUTS`.
    """
    return [_sharding(a, devices, layout) for a in arguments]


def _sharding(argument: Argument, devices: int, layout: str) -> str:
    shape = argument.shape
    if argument.role is Role.BATCH:
        spread = shape and shape[0] % devices == 0
        return _along(0, len(shape), devices) if spread else REPLICATED
    if layout != "sharded":
        return REPLICATED
    count = 1
    for size in shape:
        count *= size
    if count < max(_LEAST, devices):
        return REPLICATED
    for i, size in enumerate(shape):
        if size % devices == 0:
            return _along(i, len(shape), devices)
    return REPLICATED


def _along(dimension: int, dimensions: int, devices: int) -> str:
    tiles = ["1"] * dimensions
    tiles[dimension] = str(devices)
    return f"{{devices=[{','.join(tiles)}]<=[{devices}]}}"


_MARK = re.compile(
    r"(?P<result>%\S+) = stablehlo\.optimization_barrier (?P<operand>%[^\s,]+) : (?P<type>tensor<[^>]*>)"
)
_SIZES = re.compile(r"tensor<((?:\d+x)*)")


def spread_marks(stablehlo: bytes, devices: int) -> bytes:
    """Return a program with each barrier of one tensor turned into the annotation that its rows are spread.

    Args:
        stablehlo: Text.
        devices: How many the rows are spread over; where they do not divide evenly the mark says nothing.
    """

    def annotated(match: re.Match[str]) -> str:
        sizes = _dimensions(match["type"])
        if not sizes or sizes[0] % devices:
            return match[0]
        sharding = _along(0, len(sizes), devices)
        return (
            f"{match['result']} = stablehlo.custom_call @Sharding({match['operand']}) "
            f'{{mhlo.sharding = "{sharding}"}} : ({match["type"]}) -> {match["type"]}'
        )

    return _MARK.sub(annotated, stablehlo.decode()).encode()


def _dimensions(kind: str) -> Sequence[int]:
    match = _SIZES.match(kind)
    assert match is not None, kind
    return [int(size) for size in match[1].split("x") if size]
