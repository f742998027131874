"""What compiled code keeps of FP8 layers: norms that their cast computes, copies that the backward makes."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F

from kernel_pytorch.core.workload import Call
from kernel_pytorch.precision.convert import convert, restore
from kernel_pytorch.precision.fallback import fall_back
from kernel_pytorch.precision.observe import observe
from kernel_pytorch.precision.site import site_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo and Inductor use what is deprecated
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class RMSNorm(nn.Module):
    """As Hugging Face writes it, or as Gemma does, whose weight is beside one."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.3 + 1.0 - offset)
        self.eps, self.offset = 1e-6, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (self.weight.float() + self.offset)).to(x.dtype)


class Block(nn.Module):
    """A layer of a language model: attention whose heads share keys, and a gated MLP, each behind a norm."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = RMSNorm(64, offset), RMSNorm(64, offset)
        self.q, self.k, self.v = nn.Linear(64, 64, bias=False), nn.Linear(64, 16, bias=False), nn.Linear(64, 16)
        self.out = nn.Linear(64, 64)
        self.mlp = MLP()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        batch, length, _ = x.shape
        heads = [m(y).view(batch, length, -1, 16).transpose(1, 2) for m in (self.q, self.k, self.v)]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, 64))
        return x + self.mlp(self.second(x))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(64, 96, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(96, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def made(recipe: str = "tensorwise_delayed", offset: float = 0.0) -> Block:
    torch.manual_seed(0)
    return convert(Block(offset), recipe, example_inputs=(torch.randn(2, 24, 64),))


def saved(run, x: torch.Tensor, known: set[int]) -> list[torch.Tensor]:
    """Return what a call keeps for its backward, one tensor a storage, less parameters."""
    found = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in known:
            found[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = run(x)
    y.sum().backward()
    return list(found.values())


def test_what_layers_read_is_seen() -> None:
    model = made()
    for layer, norm, kept in (
        (model.q, model.first, False), (model.mlp.gate_proj, model.second, False), (model.out, None, True),
        (model.mlp.down_proj, None, False),
    ):  # fmt: skip
        site = site_of(layer)
        assert (site.normed is not None) == (norm is not None)
        assert norm is None or vars(norm)["_float8_norm"] is site.normed
        assert site.kept == kept
    restore(model)
    assert not any("forward" in vars(m) or name.startswith("_float8") for m in model.modules() for name in vars(m))


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_what_was_seen_stays(fails) -> None:
    torch.manual_seed(0)
    model, seen = Block(), []

    def run(x: torch.Tensor) -> torch.Tensor:
        y = torch.sigmoid(model(x))  # it keeps its result
        seen.extend([weakref.ref(x), weakref.ref(y)])
        if fails:
            raise ValueError("for a test")
        return y

    found = observe(run, Call((torch.randn(1, 8, 64, requires_grad=True),)), [model.q, model.out], [model.first])
    assert isinstance(found, str) == fails
    gc.collect()
    assert len(seen) == 2 * (1 + fails)
    assert [ref() for ref in seen[1::2]] == [None] * (1 + fails)


@pytest.mark.parametrize(
    ("recipe", "offset"), [("tensorwise_delayed", 0.0), ("tensorwise_current", 1.0), ("rowwise", 0.0)]
)
def test_compiled_as_eager(recipe, offset) -> None:
    model = made(recipe, offset)
    twin = copy.deepcopy(model)
    run = torch.compile(twin, fullgraph=True)
    for i in range(3):
        x = torch.randn(2, 24, 64) * (1 + i)
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        model.zero_grad()
        twin.zero_grad()
        y, z = model(one), run(other)
        dy = torch.randn_like(y)
        y.backward(dy)
        z.backward(dy)
        pairs = {"y": (z, y), "x": (other.grad, one.grad)}
        pairs |= {n: (p.grad, dict(model.named_parameters())[n].grad) for n, p in twin.named_parameters()}
        for what, (got, want) in pairs.items():
            # Sums in another order send a few values to the next number of FP8.
            assert (got - want).norm() <= 0.01 * want.norm(), (i, what)
    assert all(site_of(m).normed is None or site_of(m).normed.made is None for m in (twin.q, twin.mlp.up_proj))


def test_compiled_code_keeps_nothing_in_float8_and_no_norm() -> None:
    model = made()
    run = torch.compile(model, fullgraph=True)
    states = {s.untyped_storage().data_ptr() for m in (model.q, model.out, model.mlp.gate_proj, model.mlp.down_proj)
              for s in site_of(m).states.values()}  # fmt: skip
    known = states | {p.untyped_storage().data_ptr() for p in model.parameters()}
    x = torch.randn(2, 24, 64)
    for _ in range(2):
        held = saved(run, x.clone().requires_grad_(), known)
    assert not [t for t in held if t.dtype in FLOAT8]
    # The input, the sum before the MLP, queries (a view of what also held keys and values), keys, values, attention's
    # result, gates with ups.
    wide = sum(t.untyped_storage().nbytes() for t in held if t.untyped_storage().nbytes() >= 48 * 16 * 4)
    assert wide == 48 * 4 * (64 + 64 + 96 + 16 + 16 + 64 + 192)


def test_a_converted_model_is_pickled() -> None:
    model = made()
    other = pickle.loads(pickle.dumps(model))
    x = torch.randn(2, 24, 64)
    assert torch.equal(other.first(x), model.first(x))
    assert vars(other.first)["_float8_norm"] is not vars(model.first)["_float8_norm"]


def test_a_norm_is_left_alone_once_its_layers_fell_back() -> None:
    model = made()
    run = torch.compile(model, fullgraph=True)
    run(torch.randn(2, 24, 64)).sum().backward()
    for path in ("q", "mlp.gate_proj"):
        normed = site_of(model.get_submodule(path)).normed
        fall_back(model, path, "for a test")
        assert not normed.used
    torch.compiler.reset()
    torch.compile(model, fullgraph=True)(torch.randn(2, 24, 64)).sum().backward()
    assert all(vars(norm)["_float8_norm"].made is None for norm in (model.first, model.second))


def test_copies_of_the_backward_wait_for_its_gradients() -> None:
    """A compiler may put what waits for nothing of a backward at its beginning, the copies of all layers at once."""
    graphs: list[torch.fx.GraphModule] = []

    def noted(graph: torch.fx.GraphModule, inputs: object) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph)

    torch.manual_seed(0)
    model = convert(nn.Sequential(Block(), Block()), "tensorwise_delayed", example_inputs=(torch.randn(2, 24, 64),))
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=noted)
    torch.compile(model, fullgraph=True, backend=backend)(torch.randn(2, 24, 64, requires_grad=True)).sum().backward()
    (graph,) = graphs
    casts = [n for n in graph.graph.nodes if "float8_cast" in str(n.target)]
    turned = [n for n in casts if n.args[3:6] == (False, True, "read")]
    assert len(turned) == 2 * (4 + 3)  # of a block four weights and three inputs
    late = {n for n in graph.graph.nodes if n.op == "placeholder" and "tangents" in n.name}
    assert late
    for node in graph.graph.nodes:
        if any(used in late for used in node.all_input_nodes):
            late.add(node)
    assert all(n in late for n in turned)
