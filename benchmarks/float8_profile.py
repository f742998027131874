"""How much of the arithmetic that FP8 is claimed for runs in FP8 kernels, as the profiler sees it.

    python benchmarks/float8_profile.py benchmarks/training_jobs.py:llama -o FILE.json
    python benchmarks/float8_profile.py benchmarks/training_jobs.py:llama --plan out/llama -o FILE.json

Claimed are the products of every linear layer that was converted: two operations for each row, input and output
feature, for each product that the layer's recipe has in FP8. Called are the products that PyTorch's profiler recorded
(`kernel_pytorch::float8_matmul`, by the shapes of their operands), on a CPU too, where they are emulated. Seen are
those of them that launched a kernel, themselves or by an operator that they call, whose name tells of FP8 operands.
Aim: at least 90 % of what is claimed. `float8_step.py` stores the same with its variants. Variants that the file has
are not run again.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import kernel_pytorch as kp
from kernel_pytorch.backends import manager_for
from kernel_pytorch.catalog import apply_candidate, find
from kernel_pytorch.core.describe import make_optimizer, training_loss
from kernel_pytorch.core.program import begin, ship
from kernel_pytorch.core.types import Candidate, Mode, Step
from kernel_pytorch.core.workload import Call
from kernel_pytorch.precision.choice import PRODUCTS
from kernel_pytorch.precision.observe import observe
from kernel_pytorch.precision.recipes import RECIPES
from kernel_pytorch.precision.site import sites_of
from kernel_pytorch.search.bench import prepare_bench

AIM = 0.9
PRODUCT = "kernel_pytorch::float8_matmul"
FLOAT8_KERNEL = re.compile(r"e4m3|e5m2|fp8|nvjet_(sm\d+_)?[qr][qr]", re.IGNORECASE)
"""cuBLASLt names a kernel by its operands: `q` is E4M3, `r` is E5M2 (`nvjet_sm90_qrtst_...`), `t` is bfloat16."""
BASE: list[tuple[str, dict[str, Any]]] = [
    ("causal_mask", {}), ("rope", {}), ("loss_head", {}), ("compile", {"mode": "default", "scope": "loss"}),
    ("adamw", {}),
]  # fmt: skip
"""What is known to help in bf16, as in `float8_step.py`."""


def rows_of(model: nn.Module, call: Call) -> dict[int, int]:
    """Return the rows of each linear layer's input, by id of the layer; before it is converted.

    Raises:
        ValueError: The model does not run on the call.
    """
    seen = observe(model, call, [m for m in model.modules() if isinstance(m, nn.Linear)])
    if seen is None:
        raise ValueError("the model does not run on its batch: how many rows its layers have is not known")
    return seen.rows


def claimed_flops(model: nn.Module, rows: dict[int, int]) -> dict[str, float]:
    """Return the operations that FP8 is claimed for, by product."""
    claimed = dict.fromkeys(PRODUCTS, 0.0)
    for _, layer, site in sites_of(model):
        flops = 2.0 * rows.get(id(layer), 0) * layer.in_features * layer.out_features
        for product in PRODUCTS:
            learns = product != "weight_gradient" or layer.weight.requires_grad
            if getattr(site.recipe, product).float8 and learns:
                claimed[product] += flops
    return claimed


def launched(event: Any) -> list[str]:
    """Return the names of the kernels that an operator launched, and those that it called."""
    names = [kernel.name for kernel in event.kernels]
    return names + [name for child in event.cpu_children for name in launched(child)]


def seen_flops(events: Iterable[Any], steps: int) -> dict[str, Any]:
    """Return the operations a step that were called and that were seen in FP8 kernels, and in which kernels.

    Args:
        events: Of a profile, with names, shapes of operands, and the kernels that each launched.
        steps: That were recorded.
    """
    found: dict[str, Any] = {
        "called": 0.0, "in_float8_kernels": 0.0, "in_other_kernels": 0.0, "without_kernel": 0.0, "launches": 0.0,
        "kernels": {},
    }  # fmt: skip
    for event in events:
        if event.device_type != DeviceType.CPU:
            found["launches"] += bool(FLOAT8_KERNEL.search(event.name)) / steps
        elif event.name == PRODUCT:
            (m, k), (n, _) = event.input_shapes[:2]
            flops, names = 2.0 * m * n * k / steps, launched(event)
            small = [name for name in names if FLOAT8_KERNEL.search(name)]
            where = "in_float8_kernels" if small else "in_other_kernels" if names else "without_kernel"
            found["called"] += flops
            found[where] += flops
            for name in small[:1] or names[:1]:
                found["kernels"][name] = found["kernels"].get(name, 0.0) + flops
    return found


def float8_share(model: nn.Module, rows: dict[int, int], step: Callable[[], Any], steps: int = 2) -> dict[str, Any]:
    """Profile steps and return what was claimed for FP8, what was seen, and the share of it."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as recorded:
        for _ in range(steps):
            step()
        manager_for().synchronize()
    claimed = claimed_flops(model, rows)
    seen, total = seen_flops(recorded.events(), steps), sum(claimed.values())
    share = seen["in_float8_kernels"] / total if total else None
    return {"claimed": claimed, **seen, "share": share, "aim": AIM}


def variants(device: kp.DeviceSpec) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Return the steps by recipe, less those that cannot run on this machine."""
    base = [(name, params) for name, params in BASE if find(name).probe(device) is None]
    return {name: [*base, ("float8", {"recipe": name})] for name in (*RECIPES, "auto")}


def run(target: str, steps: list[tuple[str, dict[str, Any]]], plan: str | None) -> dict[str, Any]:
    """Train a few steps as given and return what was seen."""
    workload, manager = kp.load_target(target), manager_for()
    bench = prepare_bench(workload, kp.KernelPyTorchConfig.for_training(), manager, seed=0)
    rows = rows_of(bench.model, next(iter(bench.calls.values())))
    model, optimizer = bench.model, make_optimizer(workload, bench.model.parameters())
    if plan:
        model, optimizer = kp.prepare(model, optimizer, plan=plan, inputs=bench.calls, loss=training_loss(workload))
    else:
        program = begin(model, Mode.TRAINING, bench.calls, optimizer=optimizer, loss=training_loss(workload))
        program = apply_candidate(program, Candidate(tuple(Step(name, params) for name, params in steps)))
        model, optimizer = ship(program, model), program.optimizer
    batch = next(iter(bench.batches.values()))

    def step() -> None:
        kp.fused_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3):
        step()
    return float8_share(model, rows, step)


def told(found: dict[str, Any]) -> str:
    """Return what was found in a line."""
    claimed = sum(found["claimed"].values())
    if found["share"] is None:
        return "no layer is in FP8"
    return (
        f"{claimed / 1e12:.3g} TFLOP a step claimed for FP8, {found['called'] / claimed:.1%} of them called, "
        f"{found['share']:.1%} seen in FP8 kernels ({found['launches']:.0f} launches), "
        f"{found['in_other_kernels'] / claimed:.1%} in others, {found['without_kernel'] / claimed:.1%} without a kernel"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--plan", help="directory of a plan of `kpt optimize`: that alone is profiled")
    parser.add_argument("--only", default="tensorwise_delayed", help="recipes, by commas; `all`")
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds after which no variant is begun")
    args = parser.parse_args()
    began, manager = time.monotonic(), manager_for()
    artefact: dict[str, Any] = {
        "device": manager.spec.key, "software": dict(manager.spec.software), "target": args.target, "variants": {},
    }  # fmt: skip
    if args.output.exists():
        known = json.loads(args.output.read_text())
        if known["target"] != args.target:
            raise SystemExit(f"{args.output} is of {known['target']}, not {args.target}")
        artefact["variants"] = known["variants"]
    rows = artefact["variants"]
    given = {"plan": []} if args.plan else variants(manager.spec)
    for name, steps in given.items():
        if not args.plan and args.only != "all" and name not in args.only.split(","):
            continue
        if name not in rows:
            if time.monotonic() - began > args.deadline:
                print(f"{name:30s} left for later")
                continue
            torch._dynamo.reset()
            try:
                rows[name] = run(args.target, steps, args.plan)
            except (RuntimeError, ValueError) as failure:
                print(f"{name:30s} {type(failure).__name__}: {failure}"[:600])
                continue
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(artefact, indent=1) + "\n")
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        print(f"{name:30s} {told(rows[name])}")


if __name__ == "__main__":
    main()
