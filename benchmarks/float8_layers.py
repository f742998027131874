"""FP8 linear layers on a GPU: with all casts beside bf16 and torchao; casts beside copies; products alone.

    python benchmarks/float8_layers.py -o benchmarks/results/DEVICE/float8_layers.json

Each layer row first compares result and gradients with fp64 arithmetic on the recipe's own operands, and has no times
where that fails. Variants of a row are timed in turns, forwards and backwards, in bursts between CUDA events; all
samples are kept. Weights are cast anew at each pass, as after an optimizer step. Rows that the file has are not run
again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernel_pytorch.backends import manager_for
from kernel_pytorch.ops.float8_cast import E4M3, E5M2, float8_cast, fresh_state
from kernel_pytorch.ops.float8_gated_mlp import float8_gated_mlp_backward_op, float8_gated_mlp_op
from kernel_pytorch.ops.float8_matmul import float8_matmul
from kernel_pytorch.precision.emulate import multiplied
from kernel_pytorch.precision.linear import swap_linear
from kernel_pytorch.precision.recipes import RECIPES
from kernel_pytorch.precision.site import site_of

TOKENS = 16384
LAYERS = ((4096, 14336), (14336, 4096), (4096, 4096), (4096, 1024))
CASTS = ((16384, 4096), (16384, 14336), (14336, 4096))
ROUNDS, BURST_MS = 8, 20.0
_MEASURED = ", measured products"
EXACT = torch.finfo(torch.bfloat16).eps


def burst_ms(run: Callable[[], Any], repeats: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def in_turns(runs: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Return samples in ms by variant, all in turns after a warm-up of a quarter of a second."""
    repeats = {}
    for name, run in runs.items():
        burst_ms(run, 2)
        repeats[name] = max(1, math.ceil(BURST_MS / max(burst_ms(run, 2), 1e-3)))
    start = time.monotonic()
    while time.monotonic() - start < 0.25:
        for name, run in runs.items():
            burst_ms(run, repeats[name])
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(ROUNDS):
        for name in list(runs) if i % 2 else list(reversed(runs)):
            samples[name].append(burst_ms(runs[name], repeats[name]))
    return samples


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def wrongness(layer: nn.Linear, x: torch.Tensor, dy: torch.Tensor) -> dict[str, float]:
    """Return the relative errors of a layer's three products against fp64 on the operands its recipe casts."""
    site = site_of(layer)
    recipe = site.recipe
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)

    part, weight = slice(None, None, 64), layer.weight.detach()
    left, right = dy.double(), x.detach().double()
    if recipe.weight_gradient.float8:
        left, right = (multiplied(t, site, name, summed=0) for t, name in ((dy, "gradient"), (x.detach(), "input")))
    found = {
        "y": error(
            y.detach()[part],
            multiplied(x.detach(), site, "input", summed=1)[part] @ multiplied(weight, site, "weight", summed=1).t(),
        ),
        "dx": error(
            x.grad[part],
            multiplied(dy, site, "gradient", summed=1)[part] @ multiplied(weight, site, "weight", summed=0),
        ),
        "dw": error(layer.weight.grad[part], left.t()[part] @ right),
    }
    layer.zero_grad()
    return found


def torchao_layer(layer: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor] | str:
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as failure:
        return f"torchao does not import: {failure}"
    box = nn.Sequential(layer)
    convert_to_float8_training(box, config=Float8LinearConfig.from_recipe_name("tensorwise"))
    return torch.compile(box)


def layer_row(inside: int, outside: int) -> dict[str, Any]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    make = lambda: nn.Linear(inside, outside, bias=False, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    x = torch.randn(TOKENS, inside, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(TOKENS, outside, device="cuda", dtype=torch.bfloat16) * 1e-5
    row: dict[str, Any] = {"tokens": TOKENS, "in": inside, "out": outside, "errors": {}, "left_out": {}}
    runs: dict[str, Callable[[], Any]] = {}

    def step(call: Callable[[torch.Tensor], torch.Tensor], layer: nn.Linear) -> Callable[[], None]:
        given = x.detach().requires_grad_()

        def run() -> None:
            site = site_of(layer)
            if site is not None:
                site.forget_weight()
            layer.weight.grad = given.grad = None
            call(given).backward(dy)

        return run

    plain = make()
    runs["bf16"] = step(plain, plain)
    by_tensor = [name for name, recipe in RECIPES.items() if not recipe.by_row]
    for name in (*RECIPES, *(name + _MEASURED for name in by_tensor)):
        layer = make()
        swap_linear(layer, name.removesuffix(_MEASURED)).measured = name.endswith(_MEASURED)
        for _ in range(2):
            row["errors"][name] = wrongness(layer, x, dy)
        if not all(error <= EXACT for error in row["errors"][name].values()):  # NaN is above nothing
            row["left_out"][name] = "wrong"
            continue
        runs[name] = step(layer, layer)
    theirs = make()
    peer = torchao_layer(theirs)
    if isinstance(peer, str):
        row["left_out"]["torchao tensorwise compiled"] = peer
    else:
        runs["torchao tensorwise compiled"] = step(peer, theirs)
    row["samples_ms"] = in_turns(runs)
    return row


def cast_row(rows: int, columns: int) -> dict[str, Any]:
    """Casts of one shape, a cold cache by turns over inputs of more than 200 MB, beside a copy of as many bytes."""
    count = max(1, math.ceil(2.5e8 / (rows * columns * 2)))
    inputs = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    n = rows * columns
    state = fresh_state(16, "cuda")
    for x in inputs[:2]:
        float8_cast(x, E4M3, state)
    variants: dict[str, tuple[Callable[[torch.Tensor], Any], int]] = {
        "delayed both": (lambda x: float8_cast(x, E4M3, state, power_of_2=True), 4 * n),
        "delayed row": (lambda x: float8_cast(x, E4M3, state, transposed=False, power_of_2=True), 3 * n),
        "delayed transposed": (lambda x: float8_cast(x, E4M3, state, row=False, power_of_2=True), 3 * n),
        "current both": (lambda x: float8_cast(x, E4M3, power_of_2=True), 6 * n),
        "rowwise both": (lambda x: float8_cast(x, E4M3, by_row=True, power_of_2=True), 6 * n),
        "delayed both e5m2": (lambda x: float8_cast(x, E5M2, state, power_of_2=True), 4 * n),
    }
    outs = [torch.empty_like(x) for x in inputs]
    position = iter(range(10**9))

    def turn(cast: Callable[[torch.Tensor], Any]) -> Callable[[], Any]:
        return lambda: cast(inputs[next(position) % count])

    runs = {name: turn(cast) for name, (cast, _) in variants.items()}
    runs["copy"] = lambda: outs[(i := next(position) % count)].copy_(inputs[i])
    return {
        "rows": rows, "columns": columns, "bytes": {**{k: b for k, (_, b) in variants.items()}, "copy": 4 * n},
        "samples_ms": in_turns(runs),
    }  # fmt: skip


def gated_row(rows: int, columns: int) -> dict[str, Any]:
    """SwiGLU that writes FP8, beside a copy of as many bytes as its backward moves; one input exceeds the cache."""
    gate_up = torch.randn(rows, 2 * columns, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    n, states = rows * columns, [fresh_state(16, "cuda") for _ in range(2)]
    for _ in range(2):
        _, inverse = float8_gated_mlp_op(gate_up, states[0], E4M3, "silu", "forward", True)
        float8_gated_mlp_backward_op(grad, gate_up, states[1], inverse, E5M2, E4M3, "silu", True, True, True, True)
    source = torch.empty(11 * n // 4, device="cuda", dtype=torch.bfloat16)
    into = torch.empty_like(source)
    runs: dict[str, Callable[[], Any]] = {
        "forward delayed": lambda: float8_gated_mlp_op(gate_up, states[0], E4M3, "silu", "forward", True),
        "backward delayed": lambda: float8_gated_mlp_backward_op(
            grad, gate_up, states[1], inverse, E5M2, E4M3, "silu", True, True, True, True
        ),
        "forward current": lambda: float8_gated_mlp_op(gate_up, None, E4M3, "silu", "forward", True),
        "backward current": lambda: float8_gated_mlp_backward_op(
            grad, gate_up, None, inverse, E5M2, E4M3, "silu", True, True, True, True
        ),
        "copy": lambda: into.copy_(source),
    }
    count = {"forward delayed": 5, "backward delayed": 11, "forward current": 9, "backward current": 17, "copy": 11}
    return {
        "rows": rows, "columns": columns, "bytes": {k: c * n for k, c in count.items()}, "samples_ms": in_turns(runs),
    }  # fmt: skip


def product_row(rows: int, columns: int, inner: int) -> dict[str, Any]:
    """One product in bf16 and in FP8, with and without fast sums."""
    a, b = (torch.randn(s, inner, device="cuda", dtype=torch.bfloat16) for s in (rows, columns))
    small_a, small_e, small_b = float8_cast(a, E4M3), float8_cast(a, E5M2), float8_cast(b, E4M3)
    runs: dict[str, Callable[[], Any]] = {"bf16": lambda: a @ b.t()}
    for fast in (True, False):
        for name, left in (("e4m3", small_a), ("e5m2", small_e)):
            runs[f"{name}{' fast' if fast else ''}"] = lambda left=left, fast=fast: float8_matmul(
                left.row, small_b.row, left.inverse, small_b.inverse, fast=fast
            )
    return {"rows": rows, "columns": columns, "inner": inner, "samples_ms": in_turns(runs)}


def work() -> dict[str, Callable[[], dict[str, Any]]]:
    rows: dict[str, Callable[[], dict[str, Any]]] = {}
    for inside, outside in LAYERS:
        rows[f"layer {inside}->{outside}"] = lambda i=inside, o=outside: layer_row(i, o)
    for shape in CASTS:
        rows[f"cast {shape[0]}x{shape[1]}"] = lambda s=shape: cast_row(*s)
    rows[f"gated cast {TOKENS}x14336"] = lambda: gated_row(TOKENS, 14336)
    for m, n, k in ((TOKENS, 14336, 4096), (TOKENS, 4096, 14336), (14336, 4096, TOKENS), (TOKENS, 4096, 4096)):
        rows[f"product {m}x{n}x{k}"] = lambda m=m, n=n, k=k: product_row(m, n, k)
    return rows


def show(name: str, row: dict[str, Any]) -> None:
    if "error" in row:
        print(f"{name:24s} {row['error']}")
        return
    medians = {k: statistics.median(v) for k, v in row["samples_ms"].items()}
    for variant, ms in medians.items():
        if name.startswith("layer"):
            worst = max(row["errors"].get(variant, {"": 0.0}).values())
            told = f"{medians['bf16'] / ms:5.2f}x bf16" + (f"  error {worst:.1e}" if worst else "")
        elif "cast" in name:
            told = f"{row['bytes'][variant] / ms / 1e9:5.2f} TB/s"
        else:
            told = f"{2e-9 * row['rows'] * row['columns'] * row['inner'] / ms:6.0f} TFLOP/s"
        print(f"{name:24s} {variant:28s} {ms:8.3f} ms  {told}")
    for variant, why in row.get("left_out", {}).items():
        print(f"{name:24s} {variant:28s} left out: {why}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    args = parser.parse_args()
    manager = manager_for()
    artefact: dict[str, Any] = {"device": manager.spec.key, "software": dict(manager.spec.software), "rows": {}}
    if args.output.exists():
        artefact["rows"] = json.loads(args.output.read_text())["rows"]
    for name, run in work().items():
        if args.only not in name:
            continue
        if name not in artefact["rows"]:
            try:
                with manager.exclusive():
                    row = {**run(), "telemetry": dict(manager.telemetry())}
            except (RuntimeError, ValueError) as failure:
                row = {"error": f"{type(failure).__name__}: {failure}"[:400]}
            else:
                artefact["rows"][name] = row
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(artefact, indent=1) + "\n")
            torch.cuda.empty_cache()
        else:
            row = artefact["rows"][name]
        show(name, row)


if __name__ == "__main__":
    main()
