"""Where FP8 on a GPU parts from its definition: casts element by element, products against fp64, here and in backward.

    python benchmarks/float8_diagnose.py -o FILE.json

Memory that a cast is about to get is filled with a mark first, so that what the kernel leaves unwritten shows. Each
cast and product runs in this thread and in the autograd engine's, where the backward of a layer runs. Prints a line for
each with what is wrong; a line that ends in `ok` is right.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kernel_pytorch.ops.float8_cast import E4M3, E5M2, float8_cast, fresh_state
from kernel_pytorch.ops.float8_cast.reference import cast_reference
from kernel_pytorch.ops.float8_matmul import float8_matmul

MARK = 0x55
SHAPES = ((256, 128), (1024, 4096), (4096, 4096), (16384, 1024), (16384, 4096), (16384, 14336))
PRODUCTS = ((512, 384, 4096), (16384, 4096, 1024), (16384, 4096, 4096), (4096, 4096, 16384), (16384, 4096, 14336))
SMALL = ((32, 64), (20, 48))


class _InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, run: Callable[[], Any], out: list[Any]) -> torch.Tensor:
        ctx.run, ctx.out = run, out
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        ctx.out.append(ctx.run())
        return grad, None, None


def in_backward(run: Callable[[], Any], device: str) -> Any:
    """Run a function in the autograd engine, and return what it returns."""
    out: list[Any] = []
    leaf = torch.ones(1, device=device, requires_grad=True)
    _InBackward.apply(leaf, run, out).backward()
    return out[0]


def poison(count: int, device: str) -> None:
    """Fill memory that the next allocations of a size get with a mark."""
    blocks = [torch.full((count,), MARK, dtype=torch.uint8, device=device) for _ in range(4)]
    del blocks


def differences(got: torch.Tensor, want: torch.Tensor) -> dict[str, Any]:
    a, b = got.view(torch.uint8), want.view(torch.uint8)
    off = a != b
    count = int(off.sum())
    if not count:
        return {}
    at = off.nonzero()
    marked = int((off & (a == MARK)).sum())
    rows, columns = (at[:, i] for i in (0, 1))
    return {
        "different": count, "share": count / off.numel(), "still_marked": marked,
        "rows": [int(rows.min()), int(rows.max())], "columns": [int(columns.min()), int(columns.max())],
        "examples": [[int(r), int(c), int(a[r, c]), int(b[r, c])] for r, c in at[:: max(1, count // 6)][:6].tolist()],
        "by_128_rows": off.double().mean(1).view(-1, min(128, len(off))).mean(1)[:64].tolist()
        if len(off) % min(128, len(off)) == 0 else None,
    }  # fmt: skip


def cast_case(shape: tuple[int, int], form: torch.dtype, device: str, *, delayed: bool, thread: str) -> dict[str, Any]:
    torch.manual_seed(0)
    x = (torch.randn(shape, device=device) * 1e-5).bfloat16()
    mine, theirs = (fresh_state(4, device) if delayed else None for _ in range(2))
    found: dict[str, Any] = {}
    for i in range(2 if delayed else 1):
        poison(x.numel(), device)

        def run(x: torch.Tensor = x) -> Any:
            return float8_cast(x, form, mine, role="backward", power_of_2=True)

        got = run() if thread == "here" else in_backward(run, device)
        want = cast_reference([x], theirs, form, row=True, transposed=True, update=True, roll=True, power_of_2=True)
        found[f"row {i}"] = differences(got.row, want[0])
        found[f"transposed {i}"] = differences(got.transposed, want[1])
        if float(got.inverse) != float(want[2]):
            found[f"inverse {i}"] = {"got": float(got.inverse), "want": float(want[2])}
        if mine is not None and not torch.allclose(mine, theirs, rtol=1e-6):
            found[f"state {i}"] = {"got": mine.tolist(), "want": theirs.tolist()}
        x = x * 1.5
    return {k: v for k, v in found.items() if v}


def product_case(
    sizes: tuple[int, int, int], form: torch.dtype, device: str, *, fast: bool, thread: str
) -> dict[str, Any]:
    torch.manual_seed(0)
    m, n, k = sizes
    a, b = (torch.randn(s, k, device=device).bfloat16() for s in (m, n))
    small = [cast_reference([t], None, f, row=True, transposed=False, update=False, roll=False, power_of_2=True)
             for t, f in ((a, form), (b, E4M3))]  # fmt: skip

    def run() -> torch.Tensor:
        return float8_matmul(small[0][0], small[1][0], small[0][2], small[1][2], fast=fast)

    got, again = (run() if thread == "here" else in_backward(run, device) for _ in range(2))
    rows = slice(None, None, max(1, m // 64))
    want = (small[0][0][rows].double() @ small[1][0].double().t()) * small[0][2].double() * small[1][2].double()
    error = float((got[rows].double() - want).norm() / want.norm())
    found: dict[str, Any] = {} if error < torch.finfo(torch.bfloat16).eps else {"error": error}
    if not torch.equal(got, again):
        found["twice"] = "two runs differ"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", default="", help="`cast` or `product`")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    names = {E4M3: "e4m3", E5M2: "e5m2"}
    cases: dict[str, Callable[[], dict[str, Any]]] = {}
    for shape in SHAPES if on_gpu else SMALL:
        for form, name in names.items():
            for delayed in (False, True):
                for thread in ("here", "backward"):
                    label = f"cast {shape[0]}x{shape[1]} {name} {'delayed' if delayed else 'current'} {thread}"
                    cases[label] = lambda s=shape, f=form, d=delayed, t=thread: cast_case(
                        s, f, device, delayed=d, thread=t
                    )
    for sizes in PRODUCTS if on_gpu else ((32, 48, 64),):
        for form, name in names.items():
            for fast in (True, False):
                for thread in ("here", "backward"):
                    label = f"product {'x'.join(map(str, sizes))} {name}{' fast' if fast else ''} {thread}"
                    cases[label] = lambda s=sizes, f=form, q=fast, t=thread: product_case(
                        s, f, device, fast=q, thread=t
                    )
    artefact: dict[str, Any] = {"device": torch.cuda.get_device_name() if on_gpu else "cpu", "rows": {}}
    for label, run in cases.items():
        if args.only not in label:
            continue
        try:
            found = run()
        except (RuntimeError, ValueError) as failure:
            found = {"raises": f"{type(failure).__name__}: {failure}"[:300]}
        artefact["rows"][label] = found
        told = {k: {i: v[i] for i in v if i != "by_128_rows"} if isinstance(v, dict) else v for k, v in found.items()}
        print(f"{label:48s} {json.dumps(told) if found else 'ok'}", flush=True)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(artefact, indent=1) + "\n")
        if on_gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
