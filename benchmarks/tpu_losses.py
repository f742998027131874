"""Do the TPU runtimes train as PyTorch on the CPU does, and do they compile once for each bucket of lengths?

The byte GPT of `examples/gpt_train.py`, small: AdamW steps in float32 against the CPU's, in bfloat16 against what plain
bfloat16 costs on the CPU, and lengths padded to buckets on the host, with the programs counted that are compiled.

    KPT_TPU_EMULATE=1 python benchmarks/tpu_losses.py        in each environment of `make test-tpu`

Adds the runtime that is installed to the artefact and keeps the other's part. Emulated on the CPU, float32 products are
float32; a chip multiplies them in bfloat16 passes unless asked otherwise, so its figures will be other ones.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import gpt_train

from kernel_pytorch.backends.placement import place
from kernel_pytorch.backends.tpu import runtimes
from kernel_pytorch.backends.tpu.runtimes import Runtime
from kernel_pytorch.transforms.bucketing import pad_to, round_up

OUTPUT = Path(__file__).resolve().parent / "results" / "tpu-emulated" / "losses.json"

STEPS = 4
FP32_BUDGET = 1e-6
"""Largest difference of a float32 loss from the CPU's, in nats."""
BF16_FACTOR = 2.0
"""A bfloat16 loss may be this many times as far from the float32 loss as the CPU's own bfloat16 loss is."""
BUCKETS = (16, 32, 64)
LENGTHS = (9, 16, 12, 17, 25, 32, 20, 33, 48, 64, 40, 10)
IGNORED = -100


@dataclass(frozen=True)
class Size:
    """The model and its batches."""

    width: int = 64
    heads: int = 4
    layers: int = 2
    context: int = 80
    batch: int = 4
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


SMALL = Size()


@dataclass(frozen=True)
class Losses:
    """Largest differences over all seeds and steps, in nats, of one way to run.

    Attributes:
        way: `eager`, `compiled`, and in bfloat16 `parameters` or `autocast`.
        difference: From float32 on the CPU.
        budget: What is allowed.
    """

    way: str
    difference: float
    budget: float


@dataclass(frozen=True)
class Compilations:
    """Programs compiled for a sequence of lengths.

    Attributes:
        work: `forward` or `training step`.
        lengths: In order.
        padded: What each was padded to.
        compiled: Programs compiled at each.
    """

    work: str
    lengths: tuple[int, ...]
    padded: tuple[int, ...]
    compiled: tuple[int, ...]

    def by_bucket(self) -> dict[int, list[int]]:
        """Return the programs compiled at each visit of each bucket."""
        found: dict[int, list[int]] = {}
        for bucket, count in zip(self.padded, self.compiled, strict=True):
            found.setdefault(bucket, []).append(count)
        return found


def network(size: Size, seed: int) -> gpt_train.GPT:
    """Return the model of a seed, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return gpt_train.GPT(size.width, size.heads, size.layers, size.context).train()


def batches(size: Size, seed: int) -> list[torch.Tensor]:
    """Return as many batches of random bytes as there are steps: every machine has the same."""
    made = torch.Generator().manual_seed(seed)
    return [torch.randint(gpt_train.BYTES, (size.batch, size.context), generator=made) for _ in range(STEPS)]


def curve(
    size: Size,
    seed: int,
    runtime: Runtime | None,
    *,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    compiled: bool = False,
) -> list[float]:
    """Return the losses of the first steps, on a runtime or, without one, on the CPU.

    Each is the mean, taken in float64 on the host, of the tokens' losses in float32: their sum in float32 alone would
    be off by as much as is allowed.

    Args:
        size: Of model and batches.
        seed: Of both.
        runtime: Where.
        dtype: Of the parameters and the optimizer's state.
        autocast: Of the operators, by `torch.autocast`.
        compiled: Compile: the loss by `torch.compile` on TorchTPU, the whole step on PyTorch/XLA.
    """
    device = torch.device("cpu") if runtime is None else runtime.device
    # Not .to(device): on `xla` it makes each parameter anew, so that the head's weight is no longer the embedding's.
    model = place(network(size, seed).to(dtype), device)
    optimizer = gpt_train.optimizer(model.parameters())
    losses: Callable[..., torch.Tensor] = token_losses
    if compiled and runtime is not None and runtime.name == "torch_tpu":
        losses = torch.compile(losses, backend=runtime.compile_backend, dynamic=False)

    def step(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with _autocast(runtime, autocast), math_attention():
            each = losses(model, tokens, targets)
        each.mean().backward()
        optimizer.step()
        return each.detach()

    if compiled and runtime is not None and runtime.name == "torch_xla":
        step = runtime.compile(step, whole=True)  # type: ignore[attr-defined]
    found = []
    for batch in batches(size, seed):
        # Two tensors of their own: code that TorchTPU compiled does not take views with gaps.
        each = step(batch[:, :-1].contiguous().to(device), batch[:, 1:].contiguous().to(device))
        if runtime is not None:
            runtime.synchronize()
        found.append(float(each.cpu().double().mean()))
    return found


def losses(runtime: Runtime, size: Size = SMALL) -> tuple[list[Losses], list[Losses]]:
    """Return the differences in float32, and those in bfloat16 with the budgets that the CPU's bfloat16 gives."""
    exact = [curve(size, seed, None) for seed in size.seeds]

    def apart(where: Runtime | None, **how: Any) -> float:
        curves = [curve(size, seed, where, **how) for seed in size.seeds]
        return max(abs(a - b) for one, want in zip(curves, exact, strict=True) for a, b in zip(one, want, strict=True))

    fp32 = [
        Losses("eager", apart(runtime), FP32_BUDGET),
        Losses("compiled", apart(runtime, compiled=True), FP32_BUDGET),
    ]
    bf16 = []
    for way, how in (("parameters", {"dtype": torch.bfloat16}), ("autocast", {"autocast": torch.bfloat16})):
        bf16.append(Losses(way, apart(runtime, **how), BF16_FACTOR * apart(None, **how)))
    return fp32, bf16


def compilations(runtime: Runtime, size: Size = SMALL) -> list[Compilations]:
    """Return the programs compiled for each of `LENGTHS`, padded to `BUCKETS` before they reach the device.

    On the device, padding would be work of its own shape for every length, and so a program for each. A training step
    is one program on PyTorch/XLA; on TorchTPU forward and backward are apart, and so is what lies between them.
    """
    model = place(network(size, 0), runtime.device)
    optimizer = gpt_train.optimizer(model.parameters())
    forward: Callable[..., torch.Tensor] = total_loss
    if runtime.name == "torch_tpu":
        forward = torch.compile(total_loss, backend=runtime.compile_backend, dynamic=False)

    def evaluate(batch: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), math_attention():
            return forward(model, batch, targets)

    def train(batch: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with math_attention():
            value = forward(model, batch, targets)
        value.backward()
        optimizer.step()
        return value.detach()

    found = []
    # What an earlier process left on disk would not be compiled, and so not be counted.
    with torch._inductor.config.patch(force_disable_caches=True):
        for work, step in (("forward", evaluate), ("training step", train)):
            for _ in range(2):  # the optimizer makes its state, the runtime what has no length, in a bucket of its own
                _run(runtime, step, 8, 8)
            counts = []
            for length in LENGTHS:
                before = runtime.compilations()
                _run(runtime, step, length, round_up(length, BUCKETS))
                counts.append(runtime.compilations() - before)
            padded = tuple(round_up(length, BUCKETS) for length in LENGTHS)
            found.append(Compilations(work, LENGTHS, padded, tuple(counts)))
    return found


def token_losses(model: torch.nn.Module, batch: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss of each token in float32; 0 where the target is padding, which causal attention never sees."""
    logits = model(batch).float()
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, gpt_train.BYTES), targets.reshape(-1), ignore_index=IGNORED, reduction="none"
    )


def total_loss(model: torch.nn.Module, batch: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the sum of the tokens' losses."""
    return token_losses(model, batch, targets).sum()


def math_attention() -> contextlib.AbstractContextManager[Any]:
    """Attention as plain operators: its kernel for a TPU does not run on the CPU."""
    return sdpa_kernel(SDPBackend.MATH)


def _run(runtime: Runtime, step: Callable[..., torch.Tensor], length: int, bucket: int) -> None:
    made = torch.Generator().manual_seed(length)
    tokens = torch.randint(gpt_train.BYTES, (SMALL.batch, length + 1), generator=made)
    batch = pad_to(tokens[:, :-1], 1, bucket, repeat=False)
    targets = torch.full((SMALL.batch, bucket), IGNORED)
    targets[:, :length] = tokens[:, 1:]
    value = step(batch.contiguous().to(runtime.device), targets.to(runtime.device))
    runtime.synchronize()
    assert math.isfinite(float(value))


def _autocast(runtime: Runtime | None, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast("cpu" if runtime is None else runtime.autocast_device, dtype=dtype)


def wrong(fp32: Sequence[Losses], bf16: Sequence[Losses], counted: Sequence[Compilations]) -> list[str]:
    """Return a sentence for everything that is not as it should be."""
    said = [
        f"{row.way}: {row.difference:.2g} > {row.budget:.2g}"
        for row in (*fp32, *bf16)
        if not row.difference <= row.budget
    ]
    for one in counted:
        visits = one.by_bucket()
        first = {counts[0] for counts in visits.values()}
        if len(first) != 1 or not first.pop():
            said.append(f"{one.work}: buckets differ in their first compilations: {visits}")
        if any(any(counts[1:]) for counts in visits.values()):
            said.append(f"{one.work}: compiled again within a bucket: {visits}")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    parser.add_argument("--seeds", type=int, default=len(SMALL.seeds), help="of models and batches")
    parser.add_argument("--layers", type=int, default=SMALL.layers, help="of the model")
    arguments = parser.parse_args()
    size = replace(SMALL, seeds=tuple(range(arguments.seeds)), layers=arguments.layers)
    torch.set_num_threads(1)
    runtime = runtimes.load()
    fp32, bf16 = losses(runtime, size)
    counted = compilations(runtime, size)
    part = {
        "version": runtime.version,
        "torch": torch.__version__,
        "emulated": runtime.emulated,
        "fp32": [asdict(row) for row in fp32],
        "bf16": [asdict(row) for row in bf16],
        "compilations": [asdict(row) for row in counted],
    }
    artefact = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    artefact |= {"model": asdict(size), "steps": STEPS, "bf16_factor": BF16_FACTOR, "buckets": BUCKETS}
    artefact["runtimes"] = artefact.get("runtimes", {}) | {runtime.name: part}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(artefact, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(part, indent=1))
    found = wrong(fp32, bf16, counted)
    for line in found:
        print(f"WRONG: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
