"""`kernel_swap`: modules are matched by what they compute, swapped in place, and come back."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kernel_pytorch.core.program import begin, clone_model, plain_call, restore, ship, state_digest
from kernel_pytorch.core.types import DeviceSpec, Mode, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.ops.gated_mlp import gated_mlp
from kernel_pytorch.ops.layer_norm import layer_norm
from kernel_pytorch.ops.rms_norm import rms_norm
from kernel_pytorch.transforms.kernel_swap import (
    KernelSwap,
    gated_mlp_options,
    layer_norm_options,
    rms_norm_options,
)
from kernel_pytorch.validation.lift import lifted, lifted_model


class LlamaRMSNorm(nn.Module):
    def __init__(self, n: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n))
        self.variance_epsilon = eps

    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class GemmaRMSNorm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(n)), 1e-6

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).type_as(x)


class OddRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x) * 1.001


class ScaledEpsRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 2 * self.variance_epsilon)


class MLP(nn.Module):
    def __init__(self, n: int, act: nn.Module, factor: float = 1.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(n, 2 * n, bias=False), nn.Linear(n, 2 * n, bias=False)
        self.down_proj, self.act_fn, self.factor = nn.Linear(2 * n, n, bias=False), act, factor

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * self.factor


class W(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(n, 2 * n), nn.Linear(2 * n, n), nn.Linear(n, 2 * n)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = LlamaRMSNorm(16), nn.RMSNorm(16, eps=1e-6), GemmaRMSNorm(16)
        self.norm, self.mlp = nn.LayerNorm(16), MLP(16, nn.SiLU())
        self.odd = OddRMSNorm(16)

    def forward(self, x):
        return self.odd(self.mlp(self.norm(self.third(self.second(self.first(x))))))


ALL = Step("kernel_swap", {"op": "all"})


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (LlamaRMSNorm(32), {"eps": 1e-5, "weight_offset": 0.0, "round_before_weight": True}),
        (LlamaRMSNorm(32).bfloat16(), {"eps": 1e-5, "weight_offset": 0.0, "round_before_weight": True}),
        (nn.RMSNorm(32, eps=1e-6), {"eps": 1e-6, "weight_offset": 0.0, "round_before_weight": False}),
        (GemmaRMSNorm(32), {"eps": 1e-6, "weight_offset": 1.0, "round_before_weight": False}),
        (nn.RMSNorm(32), None),
        (nn.RMSNorm(32, elementwise_affine=False), None),
        (nn.RMSNorm((4, 8), eps=1e-6), None),
        (OddRMSNorm(32), None),
        (ScaledEpsRMSNorm(32), None),
        (nn.LayerNorm(32), None),
    ],
)
def test_rms_norms_are_known_by_what_they_compute(module: nn.Module, wanted: dict[str, Any] | None) -> None:
    before = torch.random.get_rng_state()
    assert rms_norm_options(module, rms_norm) == wanted
    assert torch.equal(before, torch.random.get_rng_state())


def test_hugging_faces_own_classes() -> None:
    pytest.importorskip("transformers")
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm as HFGemma
    from transformers.models.llama.modeling_llama import LlamaRMSNorm as HFLlama
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    assert rms_norm_options(HFLlama(32), rms_norm)["round_before_weight"] is True
    assert rms_norm_options(T5LayerNorm(32), rms_norm)["round_before_weight"] is True
    assert rms_norm_options(HFGemma(32), rms_norm)["weight_offset"] == 1.0


def test_layer_norms() -> None:
    assert layer_norm_options(nn.LayerNorm(8, eps=1e-3), layer_norm) == {"eps": 1e-3}
    assert layer_norm_options(nn.LayerNorm(8, bias=False), layer_norm) == {"eps": 1e-5}
    for module in (nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm((2, 4)), nn.GroupNorm(2, 8)):
        assert layer_norm_options(module, layer_norm) is None


@pytest.mark.parametrize(
    ("module", "activation"),
    [
        (MLP(16, nn.SiLU()), "silu"),
        (MLP(16, nn.GELU()), "gelu"),
        (MLP(16, nn.GELU(approximate="tanh")), "gelu_tanh"),
        (MLP(16, nn.GELU(approximate="tanh")).bfloat16(), "gelu_tanh"),
        (MLP(16, nn.GELU()).bfloat16(), "gelu"),
        (W(16), "silu"),
        (MLP(16, nn.ReLU()), None),
        (MLP(16, nn.SiLU(), factor=1.1), None),
        (MLP(16, nn.Dropout(0.5)), None),
        (nn.Linear(4, 4), None),
    ],
)
def test_gated_mlps_are_known_by_what_they_compute(module: nn.Module, activation: str | None) -> None:
    found = gated_mlp_options(module.eval(), gated_mlp)
    assert (None if found is None else found["activation"]) == activation


def test_forwards_are_swapped_and_come_back() -> None:
    torch.manual_seed(0)
    original = Net().eval()
    model, x = clone_model(original), torch.randn(3, 5, 16)
    before, keys = state_digest(model), list(original.state_dict())
    with torch.no_grad():
        expected = original(x)
        program = KernelSwap().apply(begin(model, Mode.INFERENCE, {"main": Call((x,))}), ALL)
        assert program.notes == ["kernels: 3 x rms_norm, 1 x layer_norm, 1 x gated_mlp"]
        assert "forward" not in vars(model.odd)
        shipped = ship(program, original)
        assert list(shipped.state_dict()) == keys
        assert torch.allclose(shipped(x), expected, atol=1e-5)
        twin = copy.deepcopy(shipped)
        twin.first.weight.zero_()
        assert torch.allclose(shipped(x), expected, atol=1e-5)
        assert twin.first(x).abs().max() == 0
        loaded = pickle.loads(pickle.dumps(shipped.first))
        assert "forward" not in vars(loaded) or torch.allclose(loaded(x), shipped.first(x))
        mixed = original.first(x.bfloat16())
        assert shipped.first(x.bfloat16()).dtype == mixed.dtype == torch.float32
        names: dict[str, Any] = {"model": clone_model(original)}
        names["call"] = plain_call(names["model"])
        text = KernelSwap().source(ALL)
        assert "kernel_pytorch" not in text
        exec(text.replace("torch.compile(", "(lambda f, dynamic: f)("), names)
        assert "forward" in vars(names["model"].mlp)
        assert torch.allclose(names["call"](x), expected, atol=1e-5)
    restore(shipped)
    assert state_digest(shipped) == before
    assert not any("forward" in vars(m) for m in shipped.modules())


def test_gradients_reach_the_same_parameters() -> None:
    torch.manual_seed(0)
    original = Net()
    model, x = clone_model(original), torch.randn(3, 16)
    KernelSwap().apply(begin(model, Mode.TRAINING, {"main": Call((x,))}), ALL)
    for net in (original, model):
        net(x).square().sum().backward()
    for (name, a), b in zip(original.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-4), name


def test_it_is_the_same_formula_in_lifted_fp64() -> None:
    torch.manual_seed(0)
    original = Net().eval()
    x = torch.randn(3, 16, dtype=torch.float64)
    wide = lifted_model(clone_model(original))
    with torch.no_grad(), lifted(hard_casts=True):
        want = wide(x)
        program = KernelSwap().apply(begin(wide, Mode.INFERENCE, {"main": Call((x,))}), ALL)
        assert len(program.undo) == 3
        assert sum("forward" in vars(m) for m in wide.modules()) == 5
        got = wide(x)
    assert got.dtype == torch.float64
    assert (got - want).norm() / want.norm() < 1e-12


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_it_traces_into_one_graph() -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(3, 16)
    with torch.no_grad():
        want = model(x)
        KernelSwap().apply(begin(model, Mode.INFERENCE, {"main": Call((x,))}), ALL)
        called = []
        swapped = torch.compile(model, backend=lambda graph, _: called.append(graph) or graph, fullgraph=True)
        assert torch.allclose(swapped(x), want, atol=1e-5)
    assert len(called) == 1


def test_what_does_not_fit_is_told() -> None:
    program = begin(nn.Linear(2, 2), Mode.INFERENCE, {"main": Call((torch.ones(1, 2),))})
    with pytest.raises(CandidateError, match="no module of this model"):
        KernelSwap().apply(program, ALL)
    with pytest.raises(CandidateError, match="unknown operation"):
        KernelSwap().apply(program, Step("kernel_swap", {"op": "softmax"}))


def test_it_is_for_gpus_that_triton_supports() -> None:
    gpu = DeviceSpec("nvidia", "a GPU", "sm_90", 1 << 36, 1, ("triton",), {}, 4e12, {})
    llama = WorkloadSpec(
        "llama", "f", Mode.TRAINING, {}, {}, 1, 1, 1, ("bfloat16",), {"LlamaRMSNorm": 9, "LlamaMLP": 4}, {}, {}
    )
    swap = KernelSwap()
    assert isinstance(swap.probe(dataclasses.replace(gpu, features=())), Skip)
    assert isinstance(swap.probe(dataclasses.replace(gpu, vendor="cpu")), Skip)
    assert swap.probe(dataclasses.replace(gpu, vendor="amd")) is None
    ops = [step.params["op"] for step in swap.propose(llama, gpu)]
    assert ops == ["all", "rms_norm", "gated_mlp"]
    assert isinstance(swap.propose(dataclasses.replace(llama, modules={"Conv2d": 3}), gpu), Skip)
    nothing = Prediction(1.0, 1.0, 1.0, 1.0, (), {})
    assert swap.ceiling(ALL, nothing, gpu) == float("inf")
    for op in ("all", *ops):
        compile(swap.source(Step("kernel_swap", {"op": op})), "source", "exec")


@pytest.mark.filterwarnings("ignore:Mismatch dtype:UserWarning")
def test_autocast_gives_the_dtypes_it_gave() -> None:
    torch.manual_seed(0)
    original = Net().eval()
    model, x = clone_model(original), torch.randn(3, 16)
    KernelSwap().apply(begin(model, Mode.INFERENCE, {"main": Call((x,))}), ALL)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for name in ("first", "second", "third", "norm", "mlp"):
            for given in (x, x.bfloat16()):
                want, got = getattr(original, name)(given), getattr(model, name)(given)
                assert got.dtype == want.dtype, (name, given.dtype)
                assert (got.float() - want.float()).norm() / want.float().norm() < 1e-2
