"""The public names: documented, present, and free to import."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernel_pytorch as kp

DOCS = Path(__file__).parents[2] / "docs"


def test_the_documented_names_are_the_public_ones():
    documented = re.findall(r"^\| `(\w+)` \|", (DOCS / "public-api.md").read_text(), flags=re.MULTILINE)
    assert documented == sorted(kp.__all__) == list(kp.__all__)
    assert dir(kp) == list(kp.__all__)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", kp.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(kp, name)
    assert isinstance(value, str) or value.__doc__


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        _ = kp.optimise


def test_importing_the_package_imports_nothing_heavy():
    code = "import kernel_pytorch, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {m.partition(".")[0] for m in done.stdout.split()}
    assert not {"torch", "pydantic", "typer", "click", "rich", "numpy", "scipy", "jinja2"} & loaded


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_optimize_refuses_what_it_cannot_use():
    model = torch.nn.Linear(2, 2)
    config = kp.KernelPyTorchConfig()
    with pytest.raises(kp.InputsError, match="no example inputs for the Linear"):
        kp.optimize(model)
    with pytest.raises(kp.InputsError, match="two configurations"):
        kp.optimize(model, config, config)
    with pytest.raises(kp.InputsError, match="bring their inputs"):
        kp.optimize(kp.Workload(lambda: model, lambda: torch.ones(1, 2)), torch.ones(1, 2))
    with pytest.raises(kp.TargetError, match="not understood"):
        kp.optimize("nothing")
    with pytest.raises(kp.KptError, match="budget_s"):
        kp.optimize(model, torch.ones(1, 2), budget_s=-1.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_optimize_accepts_all_three_forms(monkeypatch, tmp_path):
    from kernel_pytorch.core.management import unified_manager

    seen = []

    class Manager:
        def __init__(self, config, *, device=None):
            self.config, self.device = config, device

        def optimize(self, workload):
            seen.append((workload, self.config, self.device))
            return "result"

    monkeypatch.setattr(unified_manager, "UnifiedManager", Manager)
    model, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    (tmp_path / "m.py").write_text("import torch\ndef f():\n    return torch.nn.Linear(2, 2), torch.ones(1, 2)\n")
    config = kp.KernelPyTorchConfig.for_production()
    assert kp.optimize(model, x, budget_s=5) == "result"
    assert kp.optimize(kp.Workload(lambda: model, lambda: x), config) == "result"
    assert kp.optimize(f"{tmp_path}/m.py:f", config, device="tpu", seed=3) == "result"
    assert seen[0][0].model() is model
    assert seen[0][1].budget_s == 5
    assert seen[1][1] == config
    assert seen[2][1] == config.but(seed=3)
    assert [device for _, _, device in seen] == [None, None, "tpu"]
