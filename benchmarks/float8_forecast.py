"""What `kpt predict --float8` foresees beside what a GPU measures: does FP8 help, and by how much?

    python benchmarks/float8_forecast.py                                                    # predictions only
    python benchmarks/float8_forecast.py -o benchmarks/results/DEVICE/float8_forecast.json  # on a GPU
    python benchmarks/float8_forecast.py -o FILE --again-predict                            # by rates found since

A case is the linear layers of one block of a model, at so many tokens. Each layer is timed in bf16 and in FP8 with all
casts, forward and backward, uncompiled as the prediction is; the two in turns, in bursts of some twenty milliseconds.
Measured, FP8 helps a case where it is faster in one of its layers by 2 %, and the speed-up is that of all layers where
each is as it is faster. Layers first pass the check of `float8_layers.py` against fp64. A prediction is stored when its
case is measured; one that was made again afterwards says so. Cases that the file has are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from float8_layers import EXACT, wrongness
from torch import nn

from kernel_pytorch.backends import manager_for
from kernel_pytorch.precision.forecast import forecast
from kernel_pytorch.precision.linear import swap_linear
from kernel_pytorch.precision.site import site_of

ROUNDS, BURST_MS, WARM_SECONDS = 8, 20.0, 0.25
LEAST_GAIN, WITHIN = 0.02, 0.10


@dataclass(frozen=True)
class Case:
    """Linear layers of a block: attention's input as one, its output, and an MLP, gated where `gated`."""

    name: str
    hidden: int
    ffn: int
    tokens: int
    kv: int = 0
    gated: bool = True

    def layers(self) -> dict[str, tuple[int, int]]:
        """Return input and output features by layer."""
        kv = self.kv or self.hidden
        return {
            "qkv": (self.hidden, self.hidden + 2 * kv), "out": (self.hidden, self.hidden),
            "up": (self.hidden, (1 + self.gated) * self.ffn), "down": (self.ffn, self.hidden),
        }  # fmt: skip


CASES = (
    Case("gpt 512, 8k tokens", 512, 2048, 8192, gated=False),
    Case("gpt2 768, 2k tokens", 768, 3072, 2048, gated=False),
    Case("gpt2 768, 16k tokens", 768, 3072, 16384, gated=False),
    Case("bert-large 1024, 8k tokens", 1024, 4096, 8192, gated=False),
    Case("gpt2-large 1280, 16k tokens", 1280, 5120, 16384, gated=False),
    Case("llama-1b 2048, 4k tokens", 2048, 8192, 4096, kv=512),
    Case("llama-1b 2048, 32k tokens", 2048, 8192, 32768, kv=512),
    Case("pythia-2.8b 2560, 8k tokens", 2560, 10240, 8192, gated=False),
    Case("llama-3b 3072, 8k tokens", 3072, 8192, 8192, kv=1024),
    Case("qwen-7b 3584, 8k tokens", 3584, 18944, 8192, kv=512),
    Case("llama-8b 4096, 2k tokens", 4096, 14336, 2048, kv=1024),
    Case("llama-8b 4096, 16k tokens", 4096, 14336, 16384, kv=1024),
    Case("llama-13b 5120, 16k tokens", 5120, 13824, 16384),
    Case("llama-70b 8192, 8k tokens", 8192, 28672, 8192, kv=1024),
    Case("llama-70b 8192, 32k tokens", 8192, 28672, 32768, kv=1024),
)
SMOKE = (Case("tiny 32, 64 tokens", 32, 64, 64), Case("tiny 48, 32 tokens", 48, 96, 32, kv=16, gated=False))


def predicted(case: Case, arch: str, recipe: str) -> dict[str, Any]:
    """Return what is foreseen of a case, by layer and of all."""
    with torch.device("meta"):
        model = nn.ModuleDict({name: nn.Linear(*sizes, bias=False) for name, sizes in case.layers().items()})
    told = forecast(model, arch=arch, recipe=recipe, tokens=case.tokens)
    layers = {
        layer.paths[0]: {"bf16": layer.plain_ms, "float8": layer.float8_ms, "pays": layer.pays, "limit": layer.limit}
        for layer in told.layers
    }
    helps = any(layer.pays for layer in told.layers)
    return {"layers": layers, "helps": helps, "speedup": told.plain_ms / told.float8_ms, "source": told.source}


def in_turns(
    runs: dict[str, Callable[[], Any]], time_ms: Callable[[Callable[[], Any]], float]
) -> dict[str, list[float]]:
    """Return samples in ms by variant, forwards and backwards in turn after a warm-up."""

    def burst(run: Callable[[], Any], repeats: int) -> float:
        def several() -> None:
            for _ in range(repeats):
                run()

        return time_ms(several) / repeats

    repeats = {}
    for name, run in runs.items():
        burst(run, 2)
        repeats[name] = max(1, math.ceil(BURST_MS / max(burst(run, 2), 1e-3)))
    start = time.monotonic()
    while time.monotonic() - start < WARM_SECONDS:
        for name, run in runs.items():
            burst(run, repeats[name])
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(ROUNDS):
        for name in list(runs) if i % 2 else list(reversed(runs)):
            samples[name].append(burst(runs[name], repeats[name]))
    return samples


def layer_samples(inside: int, outside: int, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Time one layer in both formats; weights are cast anew at each pass, as after an optimizer step."""
    manager, device = manager_for(), "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch._dynamo.reset()
    make = lambda: nn.Linear(inside, outside, bias=False, device=device, dtype=torch.bfloat16)  # noqa: E731
    x = torch.randn(tokens, inside, device=device, dtype=torch.bfloat16)
    dy = torch.randn(tokens, outside, device=device, dtype=torch.bfloat16) * 1e-5

    def step(layer: nn.Linear, call: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        given = x.detach().requires_grad_()

        def run() -> None:
            site = site_of(layer)
            if site is not None:
                site.forget_weight()
            layer.weight.grad = given.grad = None
            call(given).backward(dy)

        return run

    plain, small = make(), make()
    swap_linear(small, args.recipe)
    for _ in range(2):
        errors = wrongness(small, x, dy)
    if not all(error <= EXACT for error in errors.values()):  # NaN is above nothing
        return {"errors": errors, "samples_ms": {}}
    runs = {"bf16": step(plain, plain), "float8": step(small, small)}
    if args.compiled:
        runs |= {f"{name} compiled": step(m, torch.compile(m)) for name, m in (("bf16", plain), ("float8", small))}
    return {"errors": errors, "samples_ms": in_turns(runs, manager.time_ms)}


def measured(layers: dict[str, dict[str, Any]], suffix: str = "") -> dict[str, Any] | None:
    """Return whether FP8 helped a case and by how much; `None` where a layer is wrong or none was timed so.

    Args:
        layers: By name, with `samples_ms` of `bf16` and `float8`.
        suffix: Of the variants' names: ` compiled`.
    """
    plain_ms = ms = 0.0
    helps = False
    for layer in layers.values():
        samples = layer["samples_ms"]
        if f"float8{suffix}" not in samples:
            return None
        plain, small = (statistics.median(samples[name + suffix]) for name in ("bf16", "float8"))
        pays = small < (1.0 - LEAST_GAIN) * plain
        helps |= pays
        plain_ms, ms = plain_ms + plain, ms + (small if pays else plain)
    if not layers:
        return None
    return {"helps": helps, "speedup": plain_ms / ms, "bf16_ms": plain_ms, "ms": ms}


def judged(row: dict[str, Any], suffix: str = "") -> dict[str, Any] | None:
    """Return whether a prediction was right and within a tenth; `None` where nothing is measured."""
    found = measured(row["layers"], suffix)
    if found is None:
        return None
    off = row["predicted"]["speedup"] / found["speedup"] - 1.0
    right = row["predicted"]["helps"] == found["helps"]
    return {**found, "off": off, "right": right, "within": right and abs(off) <= WITHIN}


def summarise(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Count cases, those measured, those predicted right, and those within a tenth; compiled beside uncompiled."""
    told = {}
    for name, suffix in (("uncompiled", ""), ("compiled", " compiled")):
        found = [verdict for row in rows.values() if (verdict := judged(row, suffix)) is not None]
        told[name] = {
            "cases": len(rows), "measured": len(found), "right": sum(v["right"] for v in found),
            "within": sum(v["within"] for v in found),
        }  # fmt: skip
    return told


def show(name: str, row: dict[str, Any]) -> None:
    told = row["predicted"]
    answer = f"{'FP8' if told['helps'] else 'bf16'} {told['speedup']:.2f}x"
    line = f"{name:30s} foreseen {answer:10s}"
    for suffix in ("", " compiled"):
        found = judged(row, suffix)
        if found is not None:
            truth = f"{'FP8' if found['helps'] else 'bf16'} {found['speedup']:.2f}x"
            verdict = "right" if found["right"] else "WRONG"
            line += f"  measured{suffix} {truth:10s} {verdict}, {found['off']:+.0%}"
    print(line)
    for layer, part in row["layers"].items():
        if not part["samples_ms"]:
            print(f"{name:30s} {layer} is wrong: {part['errors']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="without it nothing is measured")
    parser.add_argument("--arch", help="what is foreseen for; this machine's, without a GPU sm_90")
    parser.add_argument("--recipe", default="tensorwise_delayed")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--compiled", action="store_true", help="time compiled layers too")
    parser.add_argument("--again-predict", action="store_true", help="foresee again what is measured already")
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds after which no case is begun")
    parser.add_argument("--smoke", action="store_true", help="measure tiny cases, on a CPU too: says nothing of speed")
    args = parser.parse_args()
    began, manager, on_gpu = time.monotonic(), manager_for(), torch.cuda.is_available()
    arch = args.arch or (manager.spec.arch if on_gpu else "sm_90")
    cases = {case.name: case for case in (SMOKE if args.smoke else CASES) if args.only in case.name}
    if args.output is None or not (on_gpu or args.smoke):
        for name, case in cases.items():
            show(name, {"predicted": predicted(case, arch, args.recipe), "layers": {}})
        return
    artefact: dict[str, Any] = {
        "device": manager.spec.key, "software": dict(manager.spec.software), "recipe": args.recipe, "arch": arch,
        "emulated": not on_gpu, "rows": {},
    }  # fmt: skip
    if args.output.exists():
        artefact["rows"] = json.loads(args.output.read_text())["rows"]
    rows: dict[str, Any] = artefact["rows"]
    for name, case in cases.items():
        known = rows.get(name)
        if known is not None and args.again_predict:
            known["predicted"] = {**predicted(case, arch, args.recipe), "after_measuring": True}
        elif known is None and time.monotonic() - began < args.deadline:
            row = {"case": asdict(case), "predicted": predicted(case, arch, args.recipe), "layers": {}}
            with manager.exclusive():
                for layer, sizes in case.layers().items():
                    row["layers"][layer] = layer_samples(*sizes, case.tokens, args)
            row["telemetry"] = dict(manager.telemetry())
            rows[name] = row
            if on_gpu:
                torch.cuda.empty_cache()
        artefact["summary"] = summarise(rows)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(artefact, indent=1) + "\n")
        if name in rows:
            show(name, rows[name])
        else:
            print(f"{name:30s} left for later")
    for way, told in summarise(rows).items():
        if told["measured"]:
            print(
                f"{way}: {told['measured']} cases measured, help foreseen right in {told['right']}, "
                f"within {WITHIN:.0%} in {told['within']}"
            )


if __name__ == "__main__":
    main()
