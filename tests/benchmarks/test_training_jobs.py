"""The jobs of real sizes are what their names say."""

from __future__ import annotations

import pytest

from .loading import load

jobs = load("training_jobs")
pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]


def test_the_block_of_a_70b_llama_dominates_its_job_and_fits(monkeypatch) -> None:
    monkeypatch.setattr(jobs, "_device", lambda: "meta")
    workload = jobs.llama_70b_block()
    model = workload.model()
    layer = model.model.layers[0]
    assert (layer.mlp.gate_proj.in_features, layer.mlp.gate_proj.out_features) == (8192, 28672)
    assert (layer.self_attn.q_proj.out_features, layer.self_attn.k_proj.out_features) == (64 * 128, 8 * 128)
    total = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in model.model.layers.parameters()) > 0.95 * total
    assert 8 * total < 20e9, "weights, gradients and AdamW's two moments in bfloat16"
    assert workload.inputs(0)["input_ids"].numel() == 8192


def test_the_jobs_that_were_measured_keep_their_heads(monkeypatch) -> None:
    monkeypatch.setattr(jobs, "_device", lambda: "meta")
    config = jobs.llama_small().model().config
    assert (config.num_attention_heads, config.num_key_value_heads) == (32, 8)
