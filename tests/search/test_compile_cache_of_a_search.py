"""A confirmed candidate leaves what was compiled for it beside the plan."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kernel_pytorch import KernelPyTorchConfig, Workload
from kernel_pytorch.backends import manager_for
from kernel_pytorch.core.types import Candidate, Status, Step
from kernel_pytorch.plan import compile_cache
from kernel_pytorch.search.bench import prepare_bench
from kernel_pytorch.search.trial import TrialRequest, run_trial

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def make_input(seed: int) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))


def test_what_the_confirmation_compiles_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    workload = Workload(lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)), make_input)
    bench = prepare_bench(workload, KernelPyTorchConfig(), manager_for("cpu"), seed=0)
    candidate, kept = Candidate((Step("compile", {"mode": "default"}),)), tmp_path / "artifacts"
    screened = run_trial(bench, TrialRequest(candidate, seconds=0.5, level="quick"))
    assert screened.status is Status.OK, screened.reason
    assert not compile_cache.present(kept)
    request = TrialRequest(candidate, phase="confirm", seconds=0.5, pairs=4, level="quick", artifact_dir=str(kept))
    assert run_trial(bench, request).status is Status.OK
    assert compile_cache.present(kept)
