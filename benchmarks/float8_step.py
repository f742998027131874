"""A training step with linear layers in FP8 beside the same step in bf16: milliseconds, kernels by class, memory,
and how much of the arithmetic claimed for FP8 ran in FP8 kernels.

    python benchmarks/float8_step.py benchmarks/training_jobs.py:llama -o benchmarks/results/DEVICE/float8_step.json

Steps are applied by hand, as `kpt optimize` would: everything that is known to help in bf16, then the same with
`float8`. Each variant runs in a process of its own, so that its peak is that of one model. Variants that the file has
are not run again (`--again` runs them).
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from float8_profile import float8_share, rows_of
from float8_profile import told as told_share
from step_profile import class_of
from torch.profiler import ProfilerActivity, profile

import kernel_pytorch as kp
from kernel_pytorch.backends import manager_for
from kernel_pytorch.catalog import apply_candidate, find
from kernel_pytorch.core.describe import make_optimizer, training_loss
from kernel_pytorch.core.program import begin, ship
from kernel_pytorch.core.types import Candidate, Mode, Step
from kernel_pytorch.precision.recipes import RECIPES
from kernel_pytorch.search.bench import prepare_bench

BF16: list[tuple[str, dict[str, Any]]] = [
    ("causal_mask", {}), ("rope", {}), ("loss_head", {}), ("compile", {"mode": "default", "scope": "loss"}),
    ("adamw", {}),
]  # fmt: skip


def with_float8(steps: list[Any], params: dict[str, Any], *after: tuple[str, dict[str, Any]]) -> list[Any]:
    """Return steps with FP8 in its place: before the loss, which asks what the head runs in."""
    at = next((i for i, (name, _) in enumerate(steps) if name == "loss_head"), len(steps))
    return [*steps[:at], ("float8", params), *after, *steps[at:]]


def variants(device: kp.DeviceSpec) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Return the steps by variant, less those that cannot run on this machine."""
    base = [(name, params) for name, params in BF16 if find(name).probe(device) is None]
    chunked = [(name, {"chunked": True}) if name == "loss_head" else (name, params) for name, params in base]
    found = {"bf16": base, "bf16, loss by chunks": chunked}
    delayed, head = {"recipe": "tensorwise_delayed"}, {"recipe": "tensorwise_delayed", "head": True}
    found |= {f"float8 {name}": with_float8(base, {"recipe": name}) for name in RECIPES}
    found["float8 tensorwise_delayed, loss by chunks"] = with_float8(chunked, delayed)
    found["float8 tensorwise_delayed + head"] = with_float8(base, head)
    found["float8 tensorwise_delayed + head, loss by chunks"] = with_float8(chunked, head)
    for how, steps in (("", base), (", loss by chunks", chunked)):
        every = [steps[0], ("attention", {"backend": "measured"}), *steps[1:]]
        found[f"all winners, float8 + head{how}"] = with_float8(
            every, head, ("linear_algorithm", {"choice": "measured"})
        )
    found["all winners, float8, loss by chunks"] = with_float8(
        [chunked[0], ("attention", {"backend": "measured"}), *chunked[1:]], delayed,
        ("linear_algorithm", {"choice": "measured"}),
    )  # fmt: skip
    return found


def run(target: str, steps: list[tuple[str, dict[str, Any]]], repeats: int) -> dict[str, Any]:
    workload, manager = kp.load_target(target), manager_for()
    bench = prepare_bench(workload, kp.KernelPyTorchConfig.for_training(), manager, seed=0)
    rows = rows_of(bench.model, next(iter(bench.calls.values())))
    loss, optimizer = training_loss(workload), make_optimizer(workload, bench.model.parameters())
    program = begin(bench.model, Mode.TRAINING, bench.calls, optimizer=optimizer, loss=loss)
    program = apply_candidate(program, Candidate(tuple(Step(name, params) for name, params in steps)))
    model = ship(program, bench.model)
    batch = next(iter(bench.batches.values()))
    losses = []

    def step() -> Any:
        value = kp.fused_loss(model, batch)
        value.backward()
        program.optimizer.step()
        program.optimizer.zero_grad(set_to_none=True)
        losses.append(value.detach())
        return value

    for _ in range(3):
        step()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with manager.exclusive():
        step()
        samples = [manager.time_ms(step) for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    by_class: collections.Counter[str] = collections.Counter()
    kernels: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    profiled = 2
    kind = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with manager.exclusive(), profile(activities=[kind]) as recorded:
        for _ in range(profiled):
            step()
        manager.synchronize()
    for event in recorded.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent > 0:
            kernels[event.key] += spent / 1e3 / profiled
            calls[event.key] += event.count
            label = "float8 casts" if event.key.startswith("float8_") else class_of(event.key)
            by_class[label] += spent / 1e3 / profiled
    return {
        "ms": statistics.median(samples),
        "samples_ms": samples,
        "peak_bytes": peak,
        "losses": [float(x) for x in losses],
        "notes": list(program.notes),
        "by_class_ms": dict(by_class.most_common()),
        "float8_flops": float8_share(bench.model, rows, step),
        "kernels": [{"name": n, "ms": ms, "calls": calls[n] / profiled} for n, ms in kernels.most_common(40)],
        "telemetry": dict(manager.telemetry()),
    }


def alone(target: str, name: str, repeats: int) -> dict[str, Any]:
    """Run a variant in a process of its own; where that fails, return the error."""
    command = [sys.executable, __file__, target, "--variant", name, "--repeats", str(repeats)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": f"the process of the variant ended with code {done.returncode}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def guarded(target: str, steps: list[tuple[str, dict[str, Any]]], repeats: int) -> dict[str, Any]:
    try:
        return run(target, steps, repeats)
    except (RuntimeError, ValueError) as failure:
        return {"error": f"{type(failure).__name__}: {failure}"[:600]}


def show(name: str, row: dict[str, Any], first: float) -> None:
    if "error" in row:
        print(f"{name:30s} {row['error']}")
        return
    peak = row["peak_bytes"]
    memory = f"{peak / 2**30:5.1f} GiB" if peak else ""
    classes = ", ".join(f"{k} {v:.1f}" for k, v in row["by_class_ms"].items())
    print(f"{name:30s} {row['ms']:7.1f} ms {first / row['ms']:5.2f}x {memory}  loss {row['losses'][-1]:.4f}  {classes}")
    share = row.get("float8_flops", {})
    if share.get("share") is not None:
        print(f"{'':30s} {told_share(share)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--variant", help="run this one here and print its row as JSON; nothing is written")
    parser.add_argument("--only", default="", help="variants whose name contains one of these, by commas")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--again", action="store_true", help="run what the file has already")
    parser.add_argument("--kernels", type=int, default=12, help="kernels to print for each variant")
    args = parser.parse_args()
    manager = manager_for()
    if args.variant:
        print(json.dumps(guarded(args.target, variants(manager.spec)[args.variant], args.repeats)))
        return
    if args.output is None:
        parser.error("-o: where the artefact goes")
    artefact: dict[str, Any] = {
        "device": manager.spec.key, "software": dict(manager.spec.software), "target": args.target, "variants": {},
    }  # fmt: skip
    if args.output.exists():
        artefact["variants"] = json.loads(args.output.read_text())["variants"]
    wanted = [part for part in args.only.split(",") if part]
    rows: dict[str, Any] = artefact["variants"]
    for name in variants(manager.spec):
        if wanted and not any(part in name for part in wanted):
            continue
        if args.again or name not in rows:
            row = alone(args.target, name, args.repeats)
            if "error" not in row:
                rows[name] = row
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(artefact, indent=1) + "\n")
        else:
            row = rows[name]
        show(name, row, rows.get("bf16", row).get("ms", row.get("ms", 0.0)))
        for kernel in row.get("kernels", [])[: args.kernels]:
            print(f"{kernel['ms']:12.2f} ms {kernel['calls']:6.0f} x  {kernel['name'][:100]}")


if __name__ == "__main__":
    main()
