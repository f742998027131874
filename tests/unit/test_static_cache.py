"""Greedy decoding as a workload, and a static cache for it."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.core.program import begin, restore, ship
from kernel_pytorch.core.types import DeviceSpec, Mode, OperatorShare, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.static_cache import GreedyDecode, StaticCache, decode_workload

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
STEP = Step("static_cache")
GPU = DeviceSpec("nvidia", "a GPU", "sm_90", 1, 1, ("cuda", "cuda_graphs"), {}, 1.0, {})
SPEC = WorkloadSpec("m", "", Mode.INFERENCE, {}, {}, 1, 4, 0, ("float32",), {"GreedyDecode": 1}, {}, {})


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=None, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def prompt(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 64, (2, 5), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_a_static_cache_decodes_the_same_tokens_and_is_put_back() -> None:
    workload = decode_workload(llama, prompt, new_tokens=6)
    workload = pickle.loads(pickle.dumps(workload))
    assert workload.name == "decode 6 tokens"
    model, call = workload.model().eval(), workload.call("main", 3)
    kept = vars(model.model).keys() | set()
    want = model(**call.kwargs)
    assert want.shape == (2, 11)
    assert torch.equal(want[:, :5], call.kwargs["input_ids"])
    caches: list[str] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        caches.append(type(kwargs["past_key_values"]).__name__)

    program = StaticCache().apply(begin(model, Mode.INFERENCE, {"main": call}), STEP)
    shipped = ship(program, None)
    hook = model.model.register_forward_pre_hook(note, with_kwargs=True)
    assert torch.equal(shipped(**call.kwargs), want)
    assert {*caches} == {"StaticCache"}
    restore(shipped)
    caches.clear()
    assert torch.equal(model(**call.kwargs), want)
    hook.remove()
    assert {*caches} == {"DynamicCache"}
    assert vars(model.model).keys() == kept
    names: dict[str, Any] = {"model": model}
    exec(StaticCache().source(STEP), names)
    assert model.model.generation_config.cache_implementation == "static"
    assert torch.equal(model(call.kwargs["input_ids"][:1]), want[:1])


def test_it_is_for_decoding_only() -> None:
    transform = StaticCache()
    assert transform.propose(SPEC, GPU) == [STEP]
    for spec, device in (
        (replace(SPEC, modules={"Linear": 1}), GPU),
        (replace(SPEC, mode=Mode.TRAINING), GPU),
        (SPEC, replace(GPU, vendor="cpu")),
    ):
        assert isinstance(transform.propose(spec, device), Skip)
    shares = (OperatorShare("overhead", 0.8, 1, 0.0, 0.0), OperatorShare("matmul", 0.2, 1, 0.0, 0.0))
    assert transform.ceiling(STEP, Prediction(1.0, 1.0, 0.0, 0.0, shares, {}), GPU) == pytest.approx(5.0)
    with pytest.raises(CandidateError, match="Linear has no generate"):
        GreedyDecode(nn.Linear(2, 2), 1)
    with pytest.raises(CandidateError, match="the model has no generate"):
        transform.apply(begin(nn.Linear(2, 2), Mode.INFERENCE, {"main": Call()}), STEP)
    model = llama()
    model._can_compile_fullgraph = False
    with pytest.raises(CandidateError, match="LlamaForCausalLM does not take a static cache"):
        transform.apply(begin(model, Mode.INFERENCE, {"main": Call()}), STEP)
