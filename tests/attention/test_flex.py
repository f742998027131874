"""FlexAttention: the blocks of a band, and the kernel that is compiled for it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from kernel_pytorch.attention import AttentionShape, attention, flex, unsupported
from kernel_pytorch.attention.reference import attend

CPU = torch.device("cpu")


@pytest.mark.parametrize("lengths", [(256, 256), (300, 300), (1, 300), (130, 700), (700, 130), (128, 1)])
@pytest.mark.parametrize("alignment", ["upper_left", "lower_right"])
@pytest.mark.parametrize("band", [(None, 0), (0, 0), (100, 0), (200, 50), (None, 300), (10, None)])
def test_blocks_are_those_that_looking_at_every_score_gives(lengths, alignment, band):
    q_len, kv_len = lengths
    offset = kv_len - q_len if alignment == "lower_right" else 0
    ours = flex._blocks(q_len, kv_len, offset, *band, CPU)
    theirs = create_block_mask(flex._band(offset, *band), None, None, q_len, kv_len, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert torch.equal(ours.kv_num_blocks, theirs.kv_num_blocks)
    assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)
    assert ours.seq_lengths == theirs.seq_lengths


def test_traced_whole():
    torch._dynamo.reset()
    q, k, v = torch.randn(1, 4, 140, 16), torch.randn(1, 2, 260, 16), torch.randn(1, 2, 260, 16)
    if unsupported_here() is not None:
        pytest.skip(unsupported_here().reason)

    def call(q, k, v):
        return attention(q, k, v, window=(60, 20), alignment="lower_right", softcap=3.0, enable_gqa=True, impl="flex")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=False)
    want = attend(q, k, v, left=60, right=20, alignment="lower_right", softcap=3.0)
    torch.testing.assert_close(compiled(q, k, v), want, atol=1e-5, rtol=1e-4)


def unsupported_here():
    return flex.fits(AttentionShape(1, 2, 2, 8, 8, 16, torch.float32), CPU, backward=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_for_a_cpu():
    if unsupported_here() is not None:
        pytest.skip(unsupported_here().reason)
    shape = AttentionShape(1, 4, 2, 140, 260, 32, torch.float32, window=(60, 20), alignment="lower_right")
    skip = unsupported("flex", shape, "cpu", backward=False)
    assert skip is None, skip.reason
    assert "forward only" in unsupported("flex", shape, "cpu", backward=True).reason
