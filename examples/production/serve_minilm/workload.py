"""What the server is optimised for: the shapes it batches to, weighted by how often they occur.

    kpt optimize examples/production/serve_minilm/workload.py:workload -o out/serve

A plan covers the shapes of its workload, so the server pads every batch to the smallest of them that holds it. One
shape would make a lone request pay for a full batch; these two keep both a quiet and a busy server fast.
"""

from __future__ import annotations

import random
import sys
from functools import partial
from pathlib import Path

import torch

from kernel_pytorch import Case, Workload

sys.path.insert(0, str(Path(__file__).parents[2]))
import minilm

SHARES = {1: 0.3, 16: 0.7}
"""Share of the work (not of the requests) that batches of each size stand for."""


def inputs(seed: int, *, batch: int) -> dict[str, torch.Tensor]:
    """Return a batch of passages drawn with a seed."""
    return minilm.tokenize(random.Random(seed).sample(minilm.passages(), batch))


def workload() -> Workload:
    """Return batches of one and of sixteen passages, padded to 128 tokens."""
    cases = {f"batch {n}": Case(partial(inputs, batch=n), weight=share) for n, share in SHARES.items()}
    return Workload(model=minilm.model, inputs=cases, name="all-MiniLM-L6-v2, served")
