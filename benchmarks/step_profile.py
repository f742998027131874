"""Where the milliseconds of a training step are: kernel time by class, with a plan applied or without.

    python benchmarks/step_profile.py benchmarks/training_jobs.py:llama --plan out/llama -o FILE.json
    python benchmarks/step_profile.py benchmarks/training_jobs.py:llama -o FILE.json \\
        --steps '[["causal_mask", {}], ["compile", {"mode": "default", "scope": "loss"}], ["adamw", {}]]'

Classes are told by kernel names (cuBLAS and CUTLASS products, attention, Triton code of Inductor and of this package,
the optimizer, copies). Products are held against the rate that their floating-point operations need: parameters that
multiply, times six, times tokens. `idle_ms` is the step's own time less that of its kernels: what the GPU waits.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import statistics
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import kernel_pytorch as kp
from kernel_pytorch.backends import manager_for
from kernel_pytorch.catalog import apply_candidate
from kernel_pytorch.core.describe import make_optimizer, training_loss
from kernel_pytorch.core.program import begin, ship
from kernel_pytorch.core.types import Candidate, Mode, Step
from kernel_pytorch.search.bench import prepare_bench

CLASSES = (
    ("optimizer", r"adam|multi_tensor_apply|sgd"),
    ("attention", r"flash|fmha|cudnn.*attn|sdpa|attention|attn"),
    ("product", r"gemm|cutlass|cublas|nvjet|xmma|wgmma|splitk|sgemm|mkldnn|addmm|::mm|bmm"),
    ("copy", r"memcpy|memset|copy|fill"),
    ("inductor", r"triton_|cpp_fused"),
)


def class_of(kernel: str) -> str:
    name = kernel.lower()
    return next((label for label, pattern in CLASSES if re.search(pattern, name)), "other")


def linear_parameters(model: torch.nn.Module) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--plan", help="directory of a plan; without it the unmodified model runs")
    parser.add_argument("--steps", type=json.loads, help="steps as JSON, [[transform, params], ...], instead of a plan")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    workload, manager = kp.load_target(args.target), manager_for()
    config = kp.KernelPyTorchConfig.for_training()
    bench = prepare_bench(workload, config, manager, seed=0)
    model, loss = bench.model, training_loss(workload)
    assert config.mode is Mode.TRAINING
    optimizer = make_optimizer(workload, model.parameters())
    if args.plan:
        model, optimizer = kp.prepare(model, optimizer, plan=args.plan, inputs=bench.calls, loss=loss)
        loss = kp.fused_loss
    elif args.steps:
        candidate = Candidate(tuple(Step(name, params) for name, params in args.steps))
        program = begin(model, Mode.TRAINING, bench.calls, optimizer=optimizer, loss=loss)
        program = apply_candidate(program, candidate)
        model, optimizer, loss = ship(program, model), program.optimizer, kp.fused_loss
    batch = next(iter(bench.batches.values()))

    def step() -> Any:
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value

    for _ in range(3):
        step()
    samples = [manager.time_ms(step) for _ in range(2 * args.repeats)]
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        for _ in range(args.repeats):
            step()
        manager.synchronize()
    by_class: collections.Counter[str] = collections.Counter()
    kernels: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    for event in recorded.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent <= 0 or event.key.startswith(("ProfilerStep", "Optimizer.step", "Torch-Compiled")):
            continue
        ms = spent / 1e3 / args.repeats
        by_class[class_of(event.key)] += ms
        kernels[event.key] += ms
        calls[event.key] += event.count
    tokens = next(t for t in torch.utils._pytree.tree_leaves(batch) if isinstance(t, torch.Tensor)).numel()
    flops = 6.0 * linear_parameters(model) * tokens
    median = statistics.median(samples)
    artefact = {
        "device": manager.spec.key,
        "software": dict(manager.spec.software),
        "target": args.target,
        "plan": bool(args.plan),
        "steps": args.steps,
        "ms": median,
        "samples_ms": samples,
        "by_class_ms": dict(by_class.most_common()),
        "idle_ms": median - sum(by_class.values()),
        "product_tflop": flops / 1e12,
        "product_tflops": flops / 1e9 / by_class["product"] if by_class["product"] else None,
        "kernels": [
            {"name": n, "class": class_of(n), "ms": ms, "calls": calls[n] / args.repeats}
            for n, ms in kernels.most_common(60)
        ],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(artefact, indent=1) + "\n")
    print(f"{median:.1f} ms a step; " + ", ".join(f"{k} {v:.1f}" for k, v in by_class.most_common()))
    for name, ms in kernels.most_common(15):
        print(f"{ms:8.2f} ms  {calls[name] / args.repeats:6.0f} x  {class_of(name):10s} {name[:90]}")


if __name__ == "__main__":
    main()
