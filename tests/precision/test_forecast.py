"""What FP8 would do, foreseen from measured rates: the rates are the artefact's, the decisions are those measured."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.cli import main
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import InputsError
from kernel_pytorch.precision.forecast import forecast
from kernel_pytorch.precision.rates import RATES

from .models import Block

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    return json.loads((ROOT / RATES["sm_90"].source).read_text())["rows"]


def median(rows: dict[str, Any], row: str, variant: str) -> float:
    return statistics.median(rows[row]["samples_ms"][variant])


def test_rates_are_those_of_the_artefact(rows) -> None:
    rates = RATES["sm_90"]
    products = {name: row for name, row in rows.items() if name.startswith("product")}
    for variant, rate in (("bf16", rates.plain_flops), ("e4m3 fast", rates.fast_flops), ("e5m2", rates.exact_flops)):
        found = [
            2e3 * row["rows"] * row["columns"] * row["inner"] / median(rows, name, variant)
            for name, row in products.items()
        ]
        assert rate == pytest.approx(statistics.mean(found), rel=1e-3)
    small, large = 16384 * 4096, 16384 * 14336
    low, high = (median(rows, f"cast 16384x{n}", "delayed both") for n in (4096, 14336))
    slope = (high - low) / (large - small)
    assert rates.cast_ns == pytest.approx(1e6 * slope, rel=1e-3)
    assert rates.cast_ms == pytest.approx(low - slope * small, rel=1e-2)
    amax = (median(rows, "cast 16384x14336", "current both") - high) / large
    assert rates.amax_ns == pytest.approx(1e6 * amax, rel=1e-3)
    assert rates.layer_ms == pytest.approx(median(rows, "layer 4096->1024", "tensorwise_delayed"), rel=1e-3)


@pytest.mark.parametrize(("inside", "outside"), [(4096, 14336), (14336, 4096), (4096, 4096), (4096, 1024)])
def test_foreseen_is_near_what_was_measured(inside, outside, rows) -> None:
    with torch.device("meta"):
        layer = nn.Sequential(nn.Linear(inside, outside, bias=False))
    told = forecast(layer, tokens=16384).layers[0]
    row = f"layer {inside}->{outside}"
    assert told.plain_ms == pytest.approx(median(rows, row, "bf16"), rel=0.2)
    assert told.float8_ms == pytest.approx(median(rows, row, "tensorwise_delayed"), rel=0.12)
    assert told.pays == (median(rows, row, "tensorwise_delayed") < median(rows, row, "bf16"))


def test_small_models_keep_their_format_and_why() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))
    told = forecast(model, tokens=16384)
    assert not any(layer.pays for layer in told.layers)
    assert told.answer.startswith("FP8 is not foreseen to help on sm_90: launches")
    assert told.float8_ms == told.plain_ms


def test_layers_are_grouped_as_they_would_run() -> None:
    told = forecast(Block(32, 56), Call((torch.randn(5, 32),)))
    by_path = {layer.paths: layer for layer in told.layers}
    assert ("query", "key") in by_path
    assert by_path["query", "key"].shape.startswith("5x32x64")
    odd = next(layer for paths, layer in by_path.items() if "mlp.gate" in paths)
    assert "16 does not divide its sizes" in odd.limit
    assert "a prediction by rates measured in benchmarks/results" in str(told)


def test_an_architecture_without_rates_is_told() -> None:
    with pytest.raises(InputsError, match="FP8 was not measured on sm_100"):
        forecast(nn.Linear(16, 16), arch="sm_100")


def test_from_the_command_line(tmp_path, capsys) -> None:
    (tmp_path / "job.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def job():\n    return nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.randn(4, 64)\n"
    )
    target = f"{tmp_path / 'job.py'}:job"
    assert main(["predict", target, "--device", "cpu", "--float8", "sm_90", "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)["float8"]
    assert told["kind"] == "prediction"
    assert told["layers"][0]["shape"].startswith("4x64x64")
    assert "not foreseen to help" in told["answer"]
