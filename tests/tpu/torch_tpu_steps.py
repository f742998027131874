"""What the tests of TorchTPU run in a process of their own, since the runtime ends a process at what it cannot do.

Prints one JSON object. Run as `python -m tests.tpu.torch_tpu_steps losses|buckets|late`.
"""

from __future__ import annotations

import json
import sys

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn

from kernel_pytorch.backends import manager_for
from kernel_pytorch.catalog import apply_candidate
from kernel_pytorch.core.program import begin, clone_model, ship
from kernel_pytorch.core.types import Candidate, Mode, Step
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import KptError

STEPS = 4
FLOATS = {"float64": torch.float64, "bfloat16": torch.bfloat16}


class Block(nn.Module):
    """A pre-norm transformer block with SDPA."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        split = [p.view(batch, length, self.heads, -1).transpose(1, 2) for p in self.qkv(self.before(x)).chunk(3, -1)]
        mixed = F.scaled_dot_product_attention(*split, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.after(x))))


class Gpt(nn.Module):
    """Two blocks, tied embedding."""

    def __init__(self, vocab: int = 256, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.blocks(self.embedding(ids))) @ self.embedding.weight.t()


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy in float32 or wider."""
    logits = model(ids[:, :-1])
    wide = logits if logits.dtype is torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, 1), ids[:, 1:].flatten())


def losses(model: nn.Module, ids: torch.Tensor, steps: tuple[Step, ...] = ()) -> list[float]:
    """Train a few steps of AdamW and return the losses before each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    program = begin(model, Mode.TRAINING, {}, optimizer=optimizer, loss=loss_of)
    program = apply_candidate(program, Candidate(steps))
    loss, shipped = program.step_loss(loss_of), ship(program, model)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        value = loss(shipped, ids)
        value.backward()
        optimizer.step()
        found.append(float(value.detach().cpu()))
    return found


def run_losses() -> dict[str, list[float]]:
    """Return the losses on the CPU and on the device, by what was run."""
    manager = manager_for("tpu")
    manager.synchronize()  # before the first backward: autograd does not learn of a device later
    torch.manual_seed(0)
    model, ids = Gpt().train(), torch.randint(0, 256, (4, 65))
    found = {"cpu": losses(clone_model(model), ids)}
    for name, dtype in FLOATS.items():
        found[f"cpu {name}"] = losses(clone_model(model).to(dtype), ids)
    backend = manager.runtime.compile_backend
    policy = Step("precision_policy", {"policy": "pure_bf16", "to": "bfloat16"})
    autocast = Step("dtype", {"to": "bfloat16", "how": "autocast"})
    in_loop = Step("scan_layers", {"block": "Block", "keep": "product:1", "plain": 0})
    for name, steps in {
        "tpu": (),
        "tpu compiled": (Step("compile", {"backend": backend}),),
        "tpu loss compiled": (Step("compile", {"backend": backend, "scope": "loss"}),),
        "tpu in a loop": (in_loop,),
        "tpu in a loop, loss compiled": (in_loop, Step("compile", {"backend": backend, "scope": "loss"})),
        "tpu pure_bf16": (policy,),
        "tpu autocast": (autocast,),
    }.items():
        found[name] = losses(clone_model(manager.place(model)), manager.place(ids), steps)
    return found


def run_buckets() -> dict[str, object]:
    """Return how many graphs were compiled for rows of 1 to 16, with and without buckets."""
    torch.manual_seed(0)
    manager = manager_for("tpu")
    model = manager.place(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval())
    compile_step = Step("compile", {"backend": manager.runtime.compile_backend})
    found: dict[str, object] = {}
    for name, steps, sizes in (
        ("bucketed", (compile_step, Step("bucketing", {"dims": "batch", "buckets": "8,16"})), (3, 5, 8, 9, 16, 1)),
        ("with its buckets", (Step("compile", {**compile_step.params, "buckets": "batch"}),), (3, 5, 8, 9, 16, 1)),
        ("each shape", (compile_step,), (3, 5, 8)),
    ):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        inputs = {n: manager.place(torch.randn(n, 8)) for n in sizes}
        calls = {str(n): Call((x,)) for n, x in inputs.items()}
        program = apply_candidate(begin(clone_model(model), Mode.INFERENCE, calls), Candidate(steps))
        shipped = ship(program, model)
        with torch.no_grad():
            right = [torch.allclose(shipped(x).cpu(), model(x).cpu(), atol=1e-6) for x in inputs.values()]
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            manager.synchronize()
            before = manager.runtime.compilations()
            for x in inputs.values():
                shipped(x)
            manager.synchronize()
        found[name] = {"right": right, "graphs": graphs, "again": manager.runtime.compilations() - before}
    return found


def run_late() -> dict[str, str]:
    """Return what loading the runtime says after a backward on the CPU."""
    torch.ones((), requires_grad=True).backward()
    try:
        manager_for("tpu").synchronize()
    except KptError as error:
        return {"error": str(error), "fix": error.fix}
    return {}


if __name__ == "__main__":
    print(json.dumps({"losses": run_losses, "buckets": run_buckets, "late": run_late}[sys.argv[1]]()))
