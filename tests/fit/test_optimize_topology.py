"""`kpt optimize --topology`: a slice whose compiler is asked about the step's memory, wherever the search runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kernel_pytorch.backends.tpu.topology import Topology, TopologyError
from kernel_pytorch.cli import main
from kernel_pytorch.core.config import KernelPyTorchConfig, TpuWants
from kernel_pytorch.core.management.unified_manager import UnifiedManager
from kernel_pytorch.fit import planned
from kernel_pytorch.fit.build import Build
from kernel_pytorch.fit.outcome import Fit, How
from tests.fit.test_fit_cli import SOURCE

SEARCH = ("--device", "cpu", "--only", "threads", "--budget", "5", "--isolation", "none")


@pytest.fixture
def target(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(SOURCE, encoding="utf-8")
    return f"{tmp_path / 'mine.py'}:workload"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Topology]:
    """What the compiler was asked about; its answers are made up."""
    seen: list[Topology] = []

    def fit(build: Build, topology: Topology, *, timeout_s: float) -> Fit:
        del timeout_s
        seen.append(topology)
        return Fit(
            "net", "tpu", topology.name, How.COMPILED, build.mode, 8, fits=True, peak_bytes=7 << 20,
            capacity_bytes=16 << 30, parts={"parameters": 5 << 20, "temporaries": 2 << 20},
        )  # fmt: skip

    monkeypatch.setattr(planned, "fit_tpu", fit)
    return seen


def test_a_search_on_the_cpu_tells_the_memory_on_the_slice(
    target: str, tmp_path: Path, asked: list[Topology], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["optimize", target, "--topology", "v5e:4x4", *SEARCH, "-o", str(out)]) == 0
    assert {t.name for t in asked} == {"v5e:4x4"}
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    assert plan["memory"][0]["place"] == "v5e:4x4"
    assert plan["memory"][0]["peak_bytes"] == 7 << 20
    assert plan["config"]["tpu"] == "v5e:4x4"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "By the compiler, for v5e:4x4" in page
    assert "v5e:4x4" in capsys.readouterr().out


def test_without_it_a_search_on_the_cpu_asks_nothing(target: str, tmp_path: Path, asked: list[Topology]) -> None:
    out = tmp_path / "out"
    assert main(["optimize", target, *SEARCH, "-o", str(out)]) == 0
    assert asked == []
    assert json.loads((out / "plan.json").read_text(encoding="utf-8"))["memory"] == []


@pytest.mark.parametrize("topology", ["v5e:9x9", "v9:2x2", "v6e:1x1"])
def test_a_wrong_one_is_told_before_the_search_as_fit_tells_it(
    target: str, tmp_path: Path, topology: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for command in (["fit", target], ["optimize", target, "--device", "cpu", "-o", str(tmp_path / "out")]):
        assert main([*command, "--topology", topology]) == 2
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]
    assert "v5e:4x4" in said[0] or "v6e:4x4" in said[0]
    assert not (tmp_path / "out" / "plan.json").exists()


def test_a_configuration_holds_a_slice_and_is_read_again_as_a_plan_stores_it() -> None:
    config = KernelPyTorchConfig(tpu=TpuWants(topology="v5p:2x2x1"))
    stored = config.as_json()
    assert stored["tpu"] == "v5p:2x2x1"
    assert KernelPyTorchConfig(tpu=stored["tpu"]).tpu == config.tpu  # type: ignore[arg-type]
    assert KernelPyTorchConfig().as_json()["tpu"] == ""
    with pytest.raises(TopologyError, match="valid ones of v5p"):
        UnifiedManager(config.but(tpu=TpuWants(topology="v5p:3x3")), device="cpu")
