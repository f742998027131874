"""What production calls: eight questions at a time, thirty-two passages each.

    kpt compare perf/workload.py:workload --base origin/main

The gate runs this file as it is in each revision. It is code like any other: a change of the workload belongs into a
commit of its own, since two revisions with different inputs are not comparable, and are refused.
"""

from __future__ import annotations

import torch
from ranker import Ranker

from kernel_pytorch import Workload

BATCH, PASSAGES, LENGTH, VOCABULARY = 8, 32, 32, 4096


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return questions and passages of random words, drawn with a seed; a third of each text is padding."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, VOCABULARY, (BATCH, 1 + PASSAGES, LENGTH), generator=generator)
    words[..., LENGTH * 2 // 3 :] = 0
    return words[:, 0], words[:, 1:]


def workload() -> Workload:
    """Return the ranker with those inputs."""
    return Workload(model=lambda: Ranker(VOCABULARY).eval(), inputs=inputs, name="ranker")
