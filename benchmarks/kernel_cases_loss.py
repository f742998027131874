"""Cases of `benchmarks/kernels.py` for training's ends: cross-entropy of a language model's head, and AdamW.

Both change or keep large state, so each phase is a whole `step`: loss with its gradients, or one optimizer update of a
fixed state (the update is in place: results are compared after the first step). Run as a script, this file measures
the peak memory of the losses instead, above what inputs take:

    python benchmarks/kernel_cases_loss.py -o benchmarks/results/DEVICE/loss_memory.json [--smoke]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))

from kernel_cases import Case, Inputs, Phases, Tensors, compiled

from kernel_pytorch._triton.launch import INTERPRETED
from kernel_pytorch.ops.adamw.shapes import many_small, transformer
from kernel_pytorch.ops.linear_cross_entropy.shapes import LLAMA_3

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# --- Cross-entropy of a linear layer ---------------------------------------------------------------------------------


def _eager(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Hugging Face's: all logits in the dtype of the head, then a copy in fp32."""
    return functional.cross_entropy(functional.linear(hidden, weight).float(), labels)


def _ours(chunk: int | None = None) -> Loss:
    def loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        from kernel_pytorch.ops.linear_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, labels, chunk=chunk, impl="triton")

    return loss


def _ours_of_logits(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What the transform `loss_head` makes of a model: its logits stay."""
    from kernel_pytorch.ops.linear_cross_entropy import cross_entropy

    return cross_entropy(functional.linear(hidden, weight), labels, impl="triton")


def _liger(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    out = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels)
    return out[0] if isinstance(out, tuple) else out


def _matmuls(hidden: torch.Tensor, weight: torch.Tensor) -> Tensors:
    """The three matrix products alone: nothing that makes logits and both gradients takes less."""
    logits = hidden @ weight.t()
    return logits @ weight, logits.t() @ hidden


def _loss_step(loss: Loss, inputs: Inputs) -> Phases:
    hidden, weight = (inputs[name].detach().requires_grad_() for name in ("hidden", "weight"))

    def step() -> Tensors:
        value = loss(hidden, weight, inputs["labels"])
        return (value, *torch.autograd.grad(value, (hidden, weight)))

    return {"step": step}


LOSSES: Mapping[str, Callable[[], Loss]] = {
    "ours": _ours,
    "ours of logits": lambda: _ours_of_logits,
    "eager": lambda: _eager,
    "compile": lambda: compiled(_eager),
    "liger": lambda: _liger,
}


def linear_cross_entropy_case(rows: int, size: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    def make(device: torch.device) -> Inputs:
        labels = torch.randint(0, columns, (rows,), device=device)
        labels[:: max(rows // 100, 2)] = -100
        # Logits of about unit size, as those of a head.
        hidden = torch.randn(rows, size, device=device).to(dtype)
        weight = (torch.randn(columns, size, device=device) * size**-0.5).to(dtype)
        return {"hidden": hidden, "weight": weight, "labels": labels}

    def oracle(inputs: Inputs) -> Mapping[str, Tensors]:
        """The definition in fp64, in parts: whole, its logits would take several times 8 GB."""
        hidden, weight, labels = inputs["hidden"].double(), inputs["weight"].double(), inputs["labels"]
        count = (labels != -100).sum()
        total, d_hidden, d_weight = 0.0, torch.empty_like(hidden), torch.zeros_like(weight)
        for part in torch.arange(rows, device=labels.device).split(1024):
            logits = (hidden[part] @ weight.t()).requires_grad_()
            loss = functional.cross_entropy(logits, labels[part], reduction="sum") / count
            (slope,) = torch.autograd.grad(loss, logits)
            total = total + loss.detach()
            d_hidden[part] = slope @ weight
            d_weight.addmm_(slope.t(), hidden[part])
        return {"step": [total, d_hidden, d_weight]}

    def tuned(chunk: int) -> Callable[[Inputs], Callable[[], Any]]:
        return lambda inputs: _loss_step(_ours(chunk), inputs)["step"]

    def kernel(warps: int, *, both: bool) -> Callable[[Inputs], Callable[[], Any]]:
        """The kernel alone, on a chunk's logits (in place, again and again: the values do not change its speed)."""

        def build(inputs: Inputs) -> Callable[[], Any]:
            from kernel_pytorch.ops.linear_cross_entropy import cross_entropy_kernel

            part = slice(0, min(rows, 4096))
            logits = inputs["hidden"][part] @ inputs["weight"].t()
            labels, one = inputs["labels"][part], torch.ones((), device=logits.device)
            losses, lse = (torch.empty(len(logits), device=logits.device) for _ in range(2))
            if both:
                return lambda: cross_entropy_kernel.launch(
                    logits, labels, losses, None, logits, scale=one, num_warps=warps
                )
            return lambda: cross_entropy_kernel.launch(logits, labels, losses, lse, None, num_warps=warps)

        return build

    def products(inputs: Inputs) -> Callable[[], Any]:
        return lambda: _matmuls(inputs["hidden"], inputs["weight"])

    names = {f"chunk={chunk}": tuned(chunk) for chunk in (1024, 2048, 4096, 8192) if chunk <= rows}
    kernels = {f"kernel both warps={w}": kernel(w, both=True) for w in (4, 8, 16, 32)}
    kernels |= {f"kernel loss warps={w}": kernel(w, both=False) for w in (4, 8, 16, 32)}
    return Case(
        op="linear_cross_entropy",
        label=f"{rows}x{size}x{columns} {str(dtype).removeprefix('torch.')}",
        make=make,
        oracle=oracle,
        variants={name: lambda inputs, build=build: _loss_step(build(), inputs) for name, build in LOSSES.items()},
        # Hidden states and weight read twice, their gradients written, and once in and out the logits and their slopes.
        bytes={"step": dtype.itemsize * (3 * (rows + columns) * size + 2 * rows * columns)},
        tolerance=1.6e-2,
        tunings={("step", name): build for name, build in {**names, **kernels, "three products": products}.items()},
    )


# --- AdamW -----------------------------------------------------------------------------------------------------------


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """Return the replay of a CUDA graph of it, so that what is timed is the GPU's time and not the host's."""
    if not torch.cuda.is_available():
        return run
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


HYPER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def adamw_case(label: str, shapes: Iterable[tuple[int, ...]], dtype: torch.dtype = torch.bfloat16) -> Case:
    shapes = list(shapes)
    numel = sum(torch.Size(s).numel() for s in shapes)
    kinds = ("param", "grad", "exp_avg", "exp_avg_sq")
    # Of a large set every 15th element is compared: some of every chunk, at all alignments; fp64 of all takes 100 GB.
    sample = 1 if numel < 1 << 20 else 15

    def make(device: torch.device) -> Inputs:
        # One buffer of each kind, cut below: thousands of named inputs would be slow to copy.
        scales = {"param": 0.02, "grad": 1e-3, "exp_avg": 1e-4, "exp_avg_sq": 1e-4}
        return {kind: (torch.randn(numel, device=device, dtype=dtype) * scales[kind]) for kind in kinds}

    def split(inputs: Inputs, kind: str) -> list[torch.Tensor]:
        """Return separate tensors, each aligned as the allocator aligns them."""
        flat = inputs[kind].square() if kind == "exp_avg_sq" else inputs[kind]
        parts = flat.split([torch.Size(s).numel() for s in shapes])
        return [part.view(s).clone() for part, s in zip(parts, shapes, strict=True)]

    def phases(build: Callable[[list[list[torch.Tensor]], list[torch.Tensor]], Callable[[], Any]]) -> Any:
        def made(inputs: Inputs) -> Phases:
            tensors = [split(inputs, kind) for kind in kinds]
            steps = [torch.full((), 10.0, device=inputs["param"].device) for _ in shapes]
            run = build(tensors, steps)
            before = [inputs["param"][::sample].double()]
            replay: list[Callable[[], Any]] = []

            def step() -> Tensors:
                if replay:
                    replay[0]()
                    return ()
                run()
                after = [torch.cat([x.flatten() for x in tensors[i]])[::sample] for i in (0, 2, 3)]
                replay.append(captured(run))
                return [after[0].double() - before.pop(), *after[1:]]

            return {"step": step}

        return made

    def oracle(inputs: Inputs) -> Mapping[str, Tensors]:
        from kernel_pytorch.ops.adamw import reference

        wide = [inputs[kind][::sample].double() for kind in kinds]
        wide[3] = inputs["exp_avg_sq"][::sample].square().double()
        before = wide[0].clone()
        reference.step(*([x] for x in wide), [torch.full((), 10.0, dtype=torch.float64)], **HYPER)
        # What is stored is rounded to the dtype: the movement is compared as the rounded parameter shows it.
        moved = wide[0].to(dtype).double() - before
        return {"step": [moved, wide[2], wide[3]]}

    def ours(tensors: list[list[torch.Tensor]], steps: list[torch.Tensor]) -> Callable[[], Any]:
        from kernel_pytorch.ops import adamw

        tables = adamw.Tables()
        return lambda: adamw.step(*tensors, steps, **HYPER, tables=tables, impl="triton")

    def pytorch(**kind: bool) -> Callable[..., Callable[[], Any]]:
        def build(tensors: list[list[torch.Tensor]], steps: list[torch.Tensor]) -> Callable[[], Any]:
            parameters = [torch.nn.Parameter(p) for p in tensors[0]]
            tensors[0][:] = [p.detach() for p in parameters]
            optimizer = torch.optim.AdamW(parameters, **HYPER, capturable=parameters[0].is_cuda, **kind)
            for p, g, m, v, s in zip(parameters, *tensors[1:], steps, strict=True):
                p.grad = g
                optimizer.state[p] = {"step": s, "exp_avg": m, "exp_avg_sq": v}
            return optimizer.step

        return build

    shared: dict[int, tuple[Inputs, list[Any]]] = {}

    def tuned(**launch: Any) -> Callable[[Inputs], Callable[[], Any]]:
        def build(inputs: Inputs) -> Callable[[], Any]:
            from kernel_pytorch.ops.adamw.op import Entry, Hyper, Tables, update

            if id(inputs) not in shared:
                tensors = [split(inputs, kind) for kind in kinds]
                steps = [torch.full((), 10.0, device=inputs["param"].device) for _ in shapes]
                shared[id(inputs)] = inputs, [Entry(*row) for row in zip(*tensors, steps, strict=True)]
            entries, tables, hyper = shared[id(inputs)][1], Tables(), [Hyper(**HYPER)]

            def run() -> None:
                update(entries, hyper, tables, **launch)

            run()
            replay = captured(run)

            def again(owner: Callable[[], None] = run) -> None:
                replay()  # reads the tables, which live as long as their owner
                del owner

            return again

        return build

    # Chunks: what programs that run at once touch lies together or apart.
    launches: list[dict[str, Any]] = [{"chunk": 2048 << i} for i in (0, 1, 2, 4)]
    launches += [{"chunk": 2048, "num_warps": 4}]
    return Case(
        op="adamw",
        label=f"{label}, {len(shapes)} tensors, {numel / 1e6:.0f}M {str(dtype).removeprefix('torch.')}",
        make=make,
        oracle=oracle,
        variants={
            "ours": phases(ours),
            "eager fused": phases(pytorch(fused=True)),
            "eager foreach": phases(pytorch(foreach=True)),
        },
        bytes={"step": 7 * dtype.itemsize * numel},
        # A bf16 parameter moves by a few of its last bits: where the exact value is near a tie, one bit apart is right.
        # The interpreter cuts bf16 where GPUs round.
        tolerance=1e-1 if INTERPRETED else 3e-2,
        tunings={
            ("step", " ".join(f"{k}={v}" for k, v in launch.items())): tuned(**launch) for launch in launches
        },
    )  # fmt: skip


CASES = [
    # As many tokens as the training job of benchmarks/training_jobs.py has: 4 sequences of 4096.
    linear_cross_entropy_case(16384, *LLAMA_3[1:]),
    # 1.02e9 parameters in 1,148 tensors, most of them small.
    adamw_case("4 layers of Llama-3-8B and small tensors", [*transformer(4), (32000, 4096), *many_small(16_000_000)]),
    adamw_case("2 layers of Llama-3-8B", transformer(2), torch.float32),
]
SMOKE_CASES = [
    linear_cross_entropy_case(12, 16, 300),
    adamw_case("small", [*transformer(1, hidden=32, inner=48, kv=16), *many_small(100)]),
    adamw_case("small", transformer(1, hidden=32, inner=48, kv=16), torch.float32),
]


def peaks(*, smoke: bool) -> list[dict[str, Any]]:
    """Return the peak memory of a loss step above its inputs, by variant, or why there is none."""
    device = torch.device("cpu" if smoke else "cuda")
    case = (SMOKE_CASES if smoke else CASES)[0]
    inputs, rows = case.make(device), []
    for name, build in case.variants.items():
        row = {"op": case.op, "case": case.label, "variant": name}
        try:
            step = build(inputs)["step"]
            step()
            if not smoke:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
                step()
                row["peak_bytes"] = torch.cuda.max_memory_allocated() - held
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, without memory")
    parser.add_argument("--quick", action="store_true", help="the same: there is one case")
    args = parser.parse_args()
    from kernels import environment

    rows = peaks(smoke=args.smoke)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if args.smoke else "cuda")
    args.output.write_text(json.dumps({"rows": rows, "environment": environment(device)}, indent=1) + "\n")
    for row in rows:
        size = f"{row['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in row else row.get("failed", "ran")[:90]
        print(f"{row['case']} {row['variant']}: {size}")


if __name__ == "__main__":
    main()
