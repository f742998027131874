"""Every deliberate fault is rejected, and for the right reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import faults as benchmark
from kernel_pytorch.core.types import Mode, Status

from .faulty import BY_NAME, FAULTS
from .harness import Attempt, applies, failed_checks, reason_matches, try_out

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

WHERE = {
    "softmax_scale": ("tagger", "bert"),
    "wrong_eps": ("tagger", "convnet"),
    "other_length": ("tagger", "lstm"),
    "buffer_stale": ("convnet",),
    "structure": ("mlp", "tagger", "bert", "lstm", "vae"),
    "output_dtype": ("mlp", "spectral", "llama"),
    "mode_left": ("mlp", "convnet"),
    "mode_inside": ("mlp", "convnet"),
    "rng_fixed": ("mlp", "vae"),
    "untied": ("mlp", "llama"),
}
CELLS = [
    Attempt(fault.name, size, model, mode)
    for fault in FAULTS
    for model in WHERE.get(fault.name, ("mlp", "tagger"))
    for mode in sorted(fault.modes)
    for size in fault.sizes
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def memo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memo")


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.key.replace("/", "-"))
def test_fault_is_rejected_for_the_right_reason(cell: Attempt, memo: Path):
    scratch = memo / f"{cell.model}-{cell.mode.value}"
    scratch.mkdir(exist_ok=True)
    outcome = try_out(cell, scratch)
    if not applies(outcome):
        pytest.skip(outcome.reason)
    assert outcome.status is not Status.OK, "the fault was not seen"
    assert reason_matches(BY_NAME[cell.fault], outcome), [str(c) for c in failed_checks(outcome)] or outcome.reason


@pytest.mark.parametrize("name", ["bias_dropped", "zeroed", "overwritten", "low_precision_scale"])
def test_bfloat16_does_not_hide_a_fault(name: str):
    outcome = try_out(Attempt(name, "element", "tagger", Mode.INFERENCE, "bf16"))
    assert outcome.status is Status.WRONG
    assert reason_matches(BY_NAME[name], outcome), outcome.reason


def test_page_agrees_with_the_artefacts():
    page = benchmark.DOCS.read_text()
    device = page.partition("Measured on `")[2].partition("`")[0]
    directory = ROOT / "benchmarks" / "results" / device
    assert (directory / "faults.json").is_file()
    assert benchmark.documented(page, benchmark.generated(directory)) == page


def test_artefact_covers_every_fault_in_company_and_counts_itself():
    (path,) = (ROOT / "benchmarks" / "results").glob("*/faults.json")
    rows = [r for r in json.loads(path.read_text())["rows"] if r["status"] != "n/a"]
    for fault in FAULTS:
        own = [r for r in rows if r["fault"] == fault.name]
        assert {"alone", "bf16", "compile", "bf16+compile"} <= {r["combination"] for r in own}, fault.name
    assert len({r["model"] for r in rows}) >= 6
    assert len({r["key"] for r in rows}) == len(rows)
