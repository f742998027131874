"""`kpt fit` as a user runs it, on devices that need no TPU software."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kernel_pytorch.backends.tpu import compiler
from kernel_pytorch.backends.tpu.topology import parse_topology
from kernel_pytorch.cli import main

SOURCE = """
import torch
from torch import nn
from kernel_pytorch import Workload

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)
    def forward(self, x):
        return self.down(torch.relu(self.up(x)))

def workload():
    return Workload(model=Net, inputs=lambda: torch.randn(8, 64), loss=lambda m, x: m(x).square().mean())

def picks():
    class Picks(nn.Module):
        def forward(self, x):
            return x[x > 0]
    return Picks(), torch.randn(4, 4)
"""


@pytest.fixture
def target(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(SOURCE, encoding="utf-8")
    return f"{tmp_path / 'mine.py'}:workload"


def test_a_cuda_device_that_is_not_here_is_estimated(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", target, "--device", "cuda", "--mode", "training", "--batch", "16", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    weights = 4 * 2 * 64 * 256 + 4 * (64 + 256)
    assert found["device"] == "cuda"
    assert found["batch"] == 16
    assert found["parts"]["parameters"] == weights
    assert 2 * weights <= found["parts"]["optimizer"] < 2 * weights + 64
    assert (
        found["flops"] == 16 * 64 * 256 * 2 * 5
    )  # two products forward; two for each weight's and one input's gradient
    if found["how"] == "estimated":
        assert found["verified"] is False
        assert "nothing ran" in found["notes"][0]


def test_this_cpu_is_measured_and_the_page_is_written(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "fit.html"
    assert main(["fit", target, "--device", "cpu", "-o", str(page)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("fits ")
    assert "floating-point operations" in said
    html = page.read_text(encoding="utf-8")
    assert 'class="membar"' in html
    assert "parameters" in html
    assert "<script" not in html
    assert "http" not in html.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--topology", "v5e:3x3"], "v5e:2x2"),
        (["--topology", "v5e:1x1"], "fix: v5e:1 for one chip"),
        (["--topology", "v5e:4x4", "--device", "cpu"], "leave --device out"),
        (["--batch", "0"], "there is nothing to run"),
        (["--batch", "-3"], "there is nothing to run"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_bad_input_is_one_line(
    target: str, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", target, *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.strip().splitlines()) == 1
    assert says in said.err


def test_shapes_that_depend_on_values_offer_buckets(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", target.replace("workload", "picks"), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "depends on values" in said
    assert "buckets" in said


def test_without_a_compiler_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    monkeypatch.setitem(__import__("sys").modules, "jax", None)
    with pytest.raises(compiler.CompilerMissingError, match="not installed") as caught:
        compiler.compile_ahead(b"", parse_topology("v5e:1"))
    assert "pip install" in caught.value.fix
