"""Variations of a call: other sizes, but none at which indices point outside."""

from __future__ import annotations

import pytest
import torch

from kernel_pytorch.core.workload import Call
from kernel_pytorch.validation.vary import batch_size, variations


@pytest.mark.parametrize("level", ["quick", "standard", "strict"])
def test_edges_of_a_graph_stay_inside_its_nodes(level: str) -> None:
    nodes, edges = torch.randn(60, 16), torch.randint(60, (2, 200), generator=torch.Generator().manual_seed(0))
    named = variations(level, 0, Call((nodes, edges)))
    assert named
    for name, call in named:
        x, ends = call.args
        assert int(ends.max()) < x.shape[0], name


def test_tokens_and_labels_leave_the_batch_a_batch() -> None:
    ids = torch.randint(3, 100, (8, 40))
    assert batch_size(Call((), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})) == 8
    assert batch_size(Call((torch.randn(32, 3, 8, 8), torch.randint(10, (32,))))) == 32
    assert batch_size(Call((ids, torch.arange(40)[None]))) == 8
    assert any(call.args[0].shape[0] == 2 for _, call in variations("standard", 0, Call((ids,))))
