"""Tiles of the FP8 casts and of the gated MLP's backward on a GPU, and measured algorithms of FP8 products.

    python benchmarks/float8_tune.py -o benchmarks/results/DEVICE/float8_tune.json [--only gated]

Each row times its variants in turns, in bursts between CUDA events on a hot GPU, after comparing results with those of
the tile in use; what differs is left out. All samples are kept; rows that the file has are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from float8_layers import in_turns

from kernel_pytorch.backends import manager_for
from kernel_pytorch.ops.float8_cast import E4M3, E5M2, float8_cast, float8_cast_kernel, fresh_state
from kernel_pytorch.ops.float8_cast.float8_cast_kernel import Tile
from kernel_pytorch.ops.float8_gated_mlp import float8_gated_mlp_kernel as gated
from kernel_pytorch.ops.float8_matmul.op import float8_matmul_op

TOKENS = 16384
TILES = [Tile(r, c, w) for r, c, w in itertools.product((32, 64, 128), (64, 128), (4, 8))]
PRODUCTS = ((TOKENS, 14336, 4096), (TOKENS, 4096, 14336), (28672, 4096, TOKENS), (TOKENS, 4096, 4096))


def same(got: Any, want: Any) -> bool:
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want, strict=True) if a.numel()
    )


def gated_row(columns: int) -> dict[str, Any]:
    gate_up = torch.randn(TOKENS, 2 * columns, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(TOKENS, columns, device="cuda", dtype=torch.bfloat16)
    state = fresh_state(16, "cuda")
    inverse = torch.ones(1, device="cuda")
    options: dict[str, Any] = {"row": True, "transposed": True, "again": True, "power_of_2": True}

    def backward() -> Any:
        return gated.backward(grad, gate_up, state, inverse, (E5M2, E4M3), "silu", **options)

    backward()
    want, used, found = backward(), gated._BACKWARD, {}
    runs: dict[str, Callable[[], Any]] = {}
    for tile in TILES:

        def run(tile: Tile = tile) -> Any:
            gated._BACKWARD = tile
            try:
                return backward()
            finally:
                gated._BACKWARD = used

        try:
            right = same(run(), want)
        except Exception as error:  # a tile that does not fit the GPU is a result
            found[str(tuple(tile))] = f"{type(error).__name__}: {error}"[:200]
            continue
        if right:
            runs[str(tuple(tile))] = run
        else:
            found[str(tuple(tile))] = "wrong"
    return {"in use": str(tuple(used)), "bytes": 11 * TOKENS * columns, "left_out": found, "samples_ms": in_turns(runs)}


def cast_row(rows: int, columns: int) -> dict[str, Any]:
    inputs = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    state, turn = fresh_state(16, "cuda"), itertools.cycle(range(3))
    options: dict[str, Any] = {"row": True, "transposed": True, "update": True, "roll": True, "power_of_2": True}
    cast = float8_cast_kernel.cast
    cast([inputs[0]], state, E4M3, **options)
    runs, found = {}, {}
    want = cast([inputs[0]], state, E4M3, **options)
    for tile in TILES:
        try:
            right = same(cast([inputs[0]], state, E4M3, tile=tile, **options), want)
        except Exception as error:  # as above
            found[str(tuple(tile))] = f"{type(error).__name__}: {error}"[:200]
            continue
        if right:
            runs[str(tuple(tile))] = lambda tile=tile: cast([inputs[next(turn)]], state, E4M3, tile=tile, **options)
        else:
            found[str(tuple(tile))] = "wrong"
    return {"in use": str(tuple(Tile())), "bytes": 4 * rows * columns, "left_out": found, "samples_ms": in_turns(runs)}


def product_row(rows: int, columns: int, inner: int, *, fast: bool) -> dict[str, Any]:
    a, b = (torch.randn(s, inner, device="cuda", dtype=torch.bfloat16) for s in (rows, columns))
    left, right = float8_cast(a, E4M3 if fast else E5M2), float8_cast(b, E4M3)
    given = (left.row, right.row, left.inverse, right.inverse, None, torch.bfloat16, fast)
    exact = (left.row[:64].double() * left.inverse) @ (right.row.double() * right.inverse).t()
    errors = {}
    for name, measured in (("pytorch", False), ("measured", True)):
        y = float8_matmul_op(*given, measured)[:64].double()
        errors[name] = float((y - exact).norm() / exact.norm())
    runs: dict[str, Callable[[], Any]] = {
        "pytorch": lambda: float8_matmul_op(*given, False),
        "measured": lambda: float8_matmul_op(*given, True),
    }
    return {"flops": 2 * rows * columns * inner, "errors": errors, "samples_ms": in_turns(runs)}


def work() -> dict[str, Callable[[], dict[str, Any]]]:
    rows: dict[str, Callable[[], dict[str, Any]]] = {f"gated {TOKENS}x14336": lambda: gated_row(14336)}
    for shape in ((TOKENS, 4096), (TOKENS, 14336), (14336, 4096)):
        rows[f"cast {shape[0]}x{shape[1]}"] = lambda s=shape: cast_row(*s)
    for m, n, k in PRODUCTS:
        for fast in (True, False):
            rows[f"product {m}x{n}x{k}{' fast' if fast else ''}"] = lambda m=m, n=n, k=k, fast=fast: product_row(
                m, n, k, fast=fast
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    args = parser.parse_args()
    found = json.loads(args.output.read_text()) if args.output.exists() else {"gpu": torch.cuda.get_device_name()}
    for name, run in work().items():
        if args.only in name and name not in found:
            with manager_for().exclusive():
                found[name] = run()
            args.output.write_text(json.dumps(found, indent=1) + "\n")
            medians = {k: statistics.median(v) for k, v in found[name]["samples_ms"].items()}
            for variant, ms in sorted(medians.items(), key=lambda item: item[1])[:4]:
                of, unit = ("bytes", "TB/s") if "bytes" in found[name] else ("flops", "TFLOP/s")
                print(f"{name:30s} {variant:18s} {ms:8.3f} ms  {found[name][of] / ms / 1e9:8.2f} {unit}")


if __name__ == "__main__":
    main()
