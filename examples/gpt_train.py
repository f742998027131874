"""Train a small byte-level GPT on the Python standard library's own source: the training workload.

    kpt optimize examples/gpt_train.py:workload --mode training -o out/gpt

Real text, nothing downloaded, about two million parameters: one step takes a fraction of a second on a CPU.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name every PyTorch program uses

from kernel_pytorch import Workload

BATCH = 8
CONTEXT = 128
WIDTH = 192
HEADS = 6
LAYERS = 4
BYTES = 256


class Block(nn.Module):
    """One pre-norm transformer block: causal attention, then a two-layer perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.contract(F.gelu(self.expand(self.norm_mlp(x))))


class GPT(nn.Module):
    """A byte-level language model; the output layer shares its weight with the byte embedding.

    Takes byte values `(batch, length)` int64, returns logits `(batch, length, 256)`.
    """

    def __init__(self, width: int = WIDTH, heads: int = HEADS, layers: int = LAYERS, context: int = CONTEXT) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, width)
        self.position = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        self.apply(self._initialize)
        nn.init.normal_(self.position, std=0.02)
        for block in self.blocks:  # as in GPT-2: the residual stream keeps its variance at any depth
            nn.init.normal_(block.project.weight, std=0.02 / math.sqrt(2 * layers))
            nn.init.normal_(block.contract.weight, std=0.02 / math.sqrt(2 * layers))
        self.head.weight = self.embed.weight

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@cache
def text() -> torch.Tensor:
    """Return the source of the standard library's top-level modules as one uint8 tensor."""
    library = Path(sysconfig.get_path("stdlib"))
    joined = b"\n".join(path.read_bytes() for path in sorted(library.glob("*.py")))
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8)


def model() -> nn.Module:
    """Return a freshly initialised model, the same one each time, in train mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT().train()


def inputs(seed: int) -> torch.Tensor:
    """Return a random batch of the text, `(BATCH, CONTEXT)` int64."""
    source = text()
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(source) - CONTEXT, (BATCH,), generator=generator)
    return torch.stack([source[s : s + CONTEXT] for s in starts.tolist()]).long()


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each byte given those before it, in nats."""
    logits = model(batch)[:, :-1]
    return F.cross_entropy(logits.reshape(-1, BYTES), batch[:, 1:].reshape(-1))


def optimizer(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """Return AdamW with the learning rate the example trains with."""
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


def workload() -> Workload:
    """Return the training step: forward, loss, backward and optimizer."""
    return Workload(model=model, inputs=inputs, loss=loss, optimizer=optimizer, name="byte GPT")


def train(steps: int, *, plan: str = "") -> list[float]:
    """Train for some steps, with a plan where one is given, and return the losses.

    This is an ordinary training loop: the plan changes two lines of it.
    """
    network = model()
    stepper = optimizer(network.parameters())
    if plan:
        import kernel_pytorch as kp

        network, stepper = kp.prepare(network, stepper, plan=plan)
    losses = []
    for step in range(steps):
        stepper.zero_grad(set_to_none=True)
        value = loss(network, inputs(step))
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        stepper.step()
        losses.append(value.item())
    return losses


def main(argv: list[str] | None = None) -> None:
    """Train and print the loss at the start and at the end, in bits a byte."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--plan", default="", help="directory of a plan made with --mode training")
    arguments = parser.parse_args(argv)
    losses = train(8 if arguments.smoke else arguments.steps, plan=arguments.plan)
    print(f"bits a byte: {losses[0] / math.log(2):.3f} -> {losses[-1] / math.log(2):.3f}")


if __name__ == "__main__":
    main()
