"""Functions that run on a GPU are timed there, whatever the test says of it."""

from __future__ import annotations

import pytest
import torch

from kernel_pytorch.core.types import Verdict
from kernel_pytorch.guard.calls import compare_calls

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_work_that_was_only_queued_counts() -> None:
    x = torch.randn(2048, 2048, device="cuda")

    def once() -> torch.Tensor:
        return x @ x

    def twice() -> torch.Tensor:
        return x @ x @ x

    seen = compare_calls(once, twice, name="products", max_seconds=20)
    assert seen.verdict is Verdict.FAIL
    assert seen.change.value > 1.5
    assert seen.head.device_key == seen.base.device_key
    assert not seen.head.device_key.startswith("cpu")
    assert sum(seen.head.kernels_ms.values()) > 1.5 * sum(seen.base.kernels_ms.values()) > 0
    assert seen.head.peak_bytes > seen.base.peak_bytes > 0
    assert seen.culprits


def test_the_same_function_is_not_slower_than_itself() -> None:
    x = torch.randn(2048, 2048, device="cuda")
    seen = compare_calls(lambda: x @ x, lambda: x @ x, name="products", max_seconds=20)
    assert seen.verdict is not Verdict.FAIL
