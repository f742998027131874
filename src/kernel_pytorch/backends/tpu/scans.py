"""Cumulative sums as libtpu 0.0.52 reads them: `chlo.scan`, of a newer StableHLO, becomes `stablehlo.reduce_window`."""

from __future__ import annotations

import re

__all__ = ["plain_scans"]

_SCAN = re.compile(
    r"(?P<name>%\w+):2 = chlo\.scan\((?P<given>%[\w#]+)\) inits \((?P<init>%\w+)\) dimension=(?P<axis>\d+) +"
    r"attributes \{is_associative = true, is_reverse = false, scan_dim_size = (?P<size>\d+) : i64\} \{\n"
    r"\s*\^bb0\([^\n]*\):\n"
    r"\s*(?P<sum>%\w+) = stablehlo\.add %\w+, %\w+ : [^\n]*\n"
    r"\s*stablehlo\.return (?P=sum), (?P=sum) : [^\n]*\n"
    r"\s*\} : \(tensor<(?P<shape>(?:\d+x)+)(?P<dtype>\w+)>, [^)]*\) -> \([^)]*\) (?P<where>loc\([^)]*\))"
)


def plain_scans(text: str) -> str:
    """Return a program whose cumulative sums are windows over all that came before, as JAX writes them for a TPU.

    A scan that is anything else (from a start other than zero, backward, its carry used) is left as it is.
    """
    for match in list(_SCAN.finditer(text)):
        zero = re.search(rf"{match['init']} = stablehlo\.constant dense<(?:0|0\.0+e\+00|false)> :", text)
        if zero is None or f"{match['name']}#1" in text:
            continue
        text = text.replace(match[0], _window(match))
        text = text.replace(f"{match['name']}#0", match["name"])
    return text


def _window(match: re.Match[str]) -> str:
    rank, axis, size = match["shape"].count("x"), int(match["axis"]), int(match["size"])
    ones = ", ".join(["1"] * rank)
    window = ", ".join(str(size) if i == axis else "1" for i in range(rank))
    padding = ", ".join(f"[{size - 1 if i == axis else 0}, 0]" for i in range(rank))
    one, full = f"tensor<{match['dtype']}>", f"tensor<{match['shape']}{match['dtype']}>"
    name, new = match["name"], f"%scan_{match['name'][1:]}"
    zero = "0" if match["dtype"].startswith(("i", "ui")) else "0.000000e+00"
    return (
        f"{new}_zero = stablehlo.constant dense<{zero}> : {one}\n"
        f'    {name} = "stablehlo.reduce_window"({match["given"]}, {new}_zero) '
        f"<{{base_dilations = array<i64: {ones}>, "
        f"padding = dense<[{padding}]> : tensor<{rank}x2xi64>, window_dilations = array<i64: {ones}>, "
        f"window_dimensions = array<i64: {window}>, window_strides = array<i64: {ones}>}}> ({{\n"
        f"    ^bb0({new}_a: {one}, {new}_b: {one}):\n"
        f"      {new}_sum = stablehlo.add {new}_a, {new}_b : {one}\n"
        f"      stablehlo.return {new}_sum : {one}\n"
        f"    }}) : ({full}, {one}) -> {full} {match['where']}"
    )
