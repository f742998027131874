"""Two workers share one GPU: they take turns on it, tell what it is, and a slower head is seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernel_pytorch.core.types import Verdict
from kernel_pytorch.guard.compare import compare_sides
from kernel_pytorch.guard.side_by_side import Side

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TARGETS = Path(__file__).parents[1] / "guard" / "workloads.py"


def test_a_slower_head_fails_with_versions_telemetry_memory_and_kernels() -> None:
    sides = [Side(label, f"{TARGETS}:{name}", mode="training") for label, name in (("base", "quick"), ("head", "slow"))]
    found = compare_sides(*sides, max_seconds=15.0, max_pairs=40)
    assert found.verdict is Verdict.FAIL, found.reason
    for facts in (found.base, found.head):
        assert {"torch", "cuda", "cudnn"} <= {*facts.software}
        assert not facts.device_key.startswith("cpu")
        assert facts.peak_bytes
        assert facts.kernels_ms


def test_a_model_is_not_slower_than_itself() -> None:
    sides = [Side(label, f"{TARGETS}:slow") for label in ("base", "head")]
    found = compare_sides(*sides, max_seconds=15.0, max_pairs=160)
    assert found.verdict is not Verdict.FAIL, found.reason
    assert len(found.head_samples_ms) >= 16
