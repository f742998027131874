"""Every job of the zoo builds and runs in small, and is in large what its name says."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from plan_factory import make_plan
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


def test_resnet_is_that_of_torchvision_where_it_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KPT_ZOO_TINY", raising=False)
    monkeypatch.setattr(zoo, "_device", lambda: "cpu")
    library, models = ModuleType("torchvision"), ModuleType("torchvision.models")
    models.resnet50 = lambda num_classes: nn.Linear(4, num_classes)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", library)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    workload = zoo.resnet50_train()
    assert workload.name.endswith("(torchvision)")
    assert zoo.classify(workload.model(), (torch.randn(2, 4), torch.tensor([0, 1]))).ndim == 0
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    assert zoo.resnet50().name.endswith("(transformers)")


def test_a_row_holds_the_chosen_one_against_the_best_compile_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_zoo", zoo)
    searches = load("searches")
    plan = make_plan()
    alone = [t for t in plan.evidence if [s.transform for s in t.candidate.steps] == ["compile"] and t.measurement]
    row = searches.outcome(plan)
    assert alone
    assert row["best_compile_speedup"][0] == max(t.measurement.ratio.value for t in alone if t.measurement)
    assert row["over_compile"] == pytest.approx(row["speedup"][0] / row["best_compile_speedup"][0])
    assert row["tried"] >= row["wrong"] + row["failed"] > 0
    assert row["peak_bytes_before"] == 176 << 20
    unlike = replace(plan, evidence=tuple(t for t in plan.evidence if t not in alone))
    assert searches.outcome(unlike)["over_compile"] is None


def test_a_search_that_fails_is_a_row_with_its_reason_and_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "model_zoo", zoo)
    searches = load("searches")
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        if "speech" in command[4]:
            raise subprocess.TimeoutExpired(command, 1.0, stderr=b"trying compile")
        return subprocess.CompletedProcess(command, 1, "", "it broke")

    monkeypatch.setattr(searches.subprocess, "run", run)
    arguments = ["searches.py", "-o", str(tmp_path), "--budget", "5", "--only"]
    monkeypatch.setattr(sys, "argv", [*arguments, "gnn_train", "speech"])
    assert searches.main() == 1
    rows = {r["name"]: r for r in json.loads((tmp_path / "searches.json").read_text())["rows"]}
    assert rows["gnn_train"]["status"] == "failed"
    assert "it broke" in rows["gnn_train"]["reason"]
    assert rows["gnn_train"]["mode"] == "training"
    assert rows["speech"]["status"] == "hung"
    assert "trying compile" in rows["speech"]["reason"]
    monkeypatch.setattr(sys, "argv", [*arguments, "gnn_train", "speech", "unet", "--deadline", "0"])
    assert searches.main() == 1
    assert len(ran) == 2
    assert "not begun before the deadline: unet" in capsys.readouterr().out


def test_every_job_names_a_factory_and_its_mode() -> None:
    architectures = {n.removesuffix("_train").removesuffix("_decode") for n in zoo.JOBS}
    assert len(architectures) >= 12
    for name, (function, mode) in zoo.JOBS.items():
        assert callable(getattr(zoo, function))
        assert mode == ("training" if name.endswith("_train") else "inference")
