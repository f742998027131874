"""Every job of the zoo builds and runs in small, and is in large what its name says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.core.describe import make_optimizer, training_loss

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"zoo_test_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


zoo = load("model_zoo")

PARAMETERS = {
    "llama": 2.80e9, "llama_decode": 2.80e9, "qwen": 2.96e9, "mixtral": 3.25e9, "bert_large": 334e6, "t5_large": 738e6,
    "whisper_medium": 764e6, "vit_large": 304e6, "convnext_large": 198e6, "resnet50": 25.6e6, "clip_large": 428e6,
}  # fmt: skip
"""Of the published models; of those cut to fewer layers, what their shapes give."""
LANGUAGE_MODELS = {"llama", "llama_decode", "llama_train", "qwen", "qwen_train", "mixtral", "mixtral_train"}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def built(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, nn.Module]:
    monkeypatch.setenv("KPT_ZOO_TINY", "1")
    monkeypatch.setattr(zoo, "_device", lambda: "cpu")
    workload = getattr(zoo, zoo.JOBS[name][0])()
    torch.manual_seed(0)
    return workload, workload.model()


@pytest.mark.parametrize("name", [n for n, (_, mode) in zoo.JOBS.items() if mode == "inference"])
def test_inference_runs_in_small(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    workload, model = built(name, monkeypatch)
    dtype = torch.bfloat16 if name in LANGUAGE_MODELS else torch.float32
    assert {p.dtype for p in model.parameters()} == {dtype}
    model.eval()
    first, again, other = (workload.call("main", seed) for seed in (0, 0, 1))
    with torch.no_grad():
        outputs = [model(*call.args, **call.kwargs) for call in (first, again, other)]
    want, same, differs = (o if isinstance(o, torch.Tensor) else next(iter(o.values())) for o in outputs)
    assert torch.isfinite(want).all()
    torch.testing.assert_close(want, same)
    assert not torch.equal(want, differs), "the seed does not reach the inputs"


@pytest.mark.parametrize("name", [n for n, (_, mode) in zoo.JOBS.items() if mode == "training"])
def test_a_training_step_runs_in_small(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    workload, model = built(name, monkeypatch)
    model.train()
    optimizer = make_optimizer(workload, model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    loss = training_loss(workload)(model, workload.batch("main", 0))
    loss.backward()
    assert torch.isfinite(loss)
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert len(silent) <= len(before) // 4, silent  # biases of keys, and those whose experts saw no token
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", PARAMETERS)
def test_in_large_it_has_the_published_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KPT_ZOO_TINY", raising=False)
    monkeypatch.setattr(zoo, "_device", lambda: "meta")
    model = getattr(zoo, name)().model()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(PARAMETERS[name], rel=0.01)


def test_every_job_names_a_factory_and_its_mode() -> None:
    architectures = {n.removesuffix("_train").removesuffix("_decode") for n in zoo.JOBS}
    assert len(architectures) >= 12
    for name, (function, mode) in zoo.JOBS.items():
        assert callable(getattr(zoo, function))
        assert mode == ("training" if name.endswith("_train") else "inference")
