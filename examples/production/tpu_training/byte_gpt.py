"""What is trained: the byte-level GPT of `examples/gpt_train.py` in static shapes, at two sizes.

    kpt fit examples/production/tpu_training/byte_gpt.py:base --topology v5e:1 --mode training
    kpt optimize examples/production/tpu_training/byte_gpt.py:base --mode training --device tpu -o out/tpu

Every batch has one shape: a TPU program is compiled for the shapes it sees, and each new one is another compilation.
Heads are 128 wide at the size that a TPU trains, as its matrix unit is; narrower ones are padded to that.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from kernel_pytorch import Workload

sys.path.insert(0, str(Path(__file__).parents[2]))
import gpt_train


@dataclass(frozen=True)
class Size:
    """A model and the batch of one process."""

    width: int
    heads: int
    layers: int
    context: int
    batch: int


SIZES = {
    "small": Size(width=64, heads=2, layers=2, context=64, batch=4),
    "base": Size(width=768, heads=6, layers=12, context=1024, batch=8),
}


def model(size: Size) -> nn.Module:
    """Return the model with the same random weights each time, in train mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return gpt_train.GPT(size.width, size.heads, size.layers, size.context).train()


def batch(seed: int, size: Size) -> torch.Tensor:
    """Return a random batch of the text, `(batch, context)` int64."""
    source = gpt_train.text()
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(source) - size.context, (size.batch,), generator=generator)
    return torch.stack([source[start : start + size.context] for start in starts.tolist()]).long()


def of(name: str) -> Workload:
    """Return the training step at a size."""
    size = SIZES[name]
    return Workload(
        model=partial(model, size),
        inputs=partial(batch, size=size),
        loss=gpt_train.loss,
        optimizer=gpt_train.optimizer,
        name=f"byte GPT, {name}",
    )


def small() -> Workload:
    """Return the size of the smoke test: under a second a step anywhere."""
    return of("small")


def base() -> Workload:
    """Return the size for a chip: that of BERT-base and GPT-2, on 8 x 1,024 bytes a process."""
    return of("base")
