"""Which arithmetic counts as seen in FP8 kernels: by hand, on a profile of a CPU, and by names that a GPU gave."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

import kernel_pytorch as kp
from kernel_pytorch.core.workload import Call

from .loading import BENCHMARKS, load

script = load("float8_profile")
CPU, CUDA = DeviceType.CPU, DeviceType.CUDA


def test_claims_are_those_computed_by_hand() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16), nn.Linear(16, 7))
    rows = script.rows_of(model, Call((torch.randn(2, 5, 32),)))
    kp.precision.convert(model, "rowwise_high_weight_gradient")  # the last layer keeps its format: 7 features
    each = 2.0 * 10 * (32 * 64 + 64 * 16)
    assert script.claimed_flops(model, rows) == {"forward": each, "input_gradient": each, "weight_gradient": 0.0}
    kp.precision.restore(model)
    model[0].weight.requires_grad_(False)
    kp.precision.convert(model, "tensorwise_current")
    assert script.claimed_flops(model, rows)["weight_gradient"] == 2.0 * 10 * 64 * 16


def event(name, shapes=(), kernels=(), device=CPU, children=()):
    launched = [SimpleNamespace(name=kernel) for kernel in kernels]
    return SimpleNamespace(name=name, input_shapes=shapes, kernels=launched, device_type=device, cpu_children=children)


def test_only_what_runs_in_a_kernel_for_fp8_is_seen() -> None:
    small, plain = "nvjet_sm90_qrtst_128x160_128x5_2x1_v_bz_coopA_algo2_TNT", "nvjet_sm90_tst_320x128_64x3_1x2_h_bz_NNT"
    product, shapes = "kernel_pytorch::float8_matmul", [[4, 8], [16, 8], [1], [1]]
    inner = event("aten::_scaled_mm", [[4, 8], [8, 16]], ["Memset (Device)", small])
    events = [
        event(product, shapes, children=[event("aten::empty"), inner]), inner,
        event(product, shapes, [small]),
        event(product, shapes, [plain]),
        event(product, shapes, children=[event("aten::empty")]),
        event("aten::mm", shapes, [small]),
        event(small, device=CUDA), event(plain, device=CUDA), event("float8_cast_kernel", device=CUDA),
    ]  # fmt: skip
    found = script.seen_flops(events, 2)
    one = 2.0 * 4 * 8 * 16 / 2
    assert found["called"] == 4 * one
    assert found["in_float8_kernels"] == 2 * one
    assert found["in_other_kernels"] == found["without_kernel"] == one
    assert found["kernels"] == {small: 2 * one, plain: one}
    assert found["launches"] == 0.5


@pytest.mark.parametrize("name", ["float8_step_first", "float8_step"])
def test_names_that_a_gpu_gave_are_told_apart(name) -> None:
    artefact = json.loads((BENCHMARKS / f"results/nvidia-sm_90-1/{name}.json").read_text())
    for name, variant in artefact["variants"].items():
        matched = [k for k in variant["kernels"] if script.FLOAT8_KERNEL.search(k["name"])]
        products = [k for k in variant["kernels"] if k["name"].startswith("nvjet")]
        assert {k["name"] for k in matched} <= {k["name"] for k in products}
        if name == "bf16":
            assert not matched
        else:
            assert sum(k["calls"] for k in matched) >= 8 * 2 * 4, "eight layers, two products or three, four matrices"


def test_on_a_cpu_all_that_is_claimed_is_called_and_nothing_seen() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    x = torch.randn(16, 32, requires_grad=True)
    rows = script.rows_of(model, Call((x,)))
    kp.precision.convert(model, "tensorwise_delayed")
    found = script.float8_share(model, rows, lambda: model(x).sum().backward(), 3)
    assert found["called"] == pytest.approx(sum(found["claimed"].values()))
    assert (found["share"], found["in_float8_kernels"]) == (0.0, 0.0)
    assert "100.0% of them called" in script.told(found)
    kp.precision.restore(model)
    assert script.float8_share(model, rows, lambda: model(x).sum().backward(), 1)["share"] is None
