"""FP8 on the GPU: casts against the definition, products and whole layers against fp64 on their own operands."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kernel_pytorch.ops.float8_cast import E4M3, E5M2, float8_cast, fresh_state
from kernel_pytorch.ops.float8_cast.reference import cast_reference, cast_rows_reference
from kernel_pytorch.ops.float8_cast.shapes import AWKWARD, SHAPES
from kernel_pytorch.ops.float8_gated_mlp import float8_gated_mlp_backward_op, float8_gated_mlp_op
from kernel_pytorch.ops.float8_gated_mlp.reference import backward_reference, forward_reference
from kernel_pytorch.ops.float8_matmul import float8_matmul, unsupported
from kernel_pytorch.precision.convert import convert
from kernel_pytorch.precision.emulate import multiplied
from kernel_pytorch.precision.linear import swap_linear
from kernel_pytorch.precision.mlp import swap_mlp
from kernel_pytorch.precision.monitor import Monitor
from kernel_pytorch.precision.recipes import RECIPES
from kernel_pytorch.precision.site import site_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),  # Dynamo's and CUDA graphs'
    pytest.mark.skipif(not torch.cuda.is_available() or unsupported("cuda", 16, 16) is not None, reason="no FP8 here"),
]

TOKENS = 16384
LAYERS = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
"""`(in_features, out_features)` of Llama-3-8B."""
EPS = torch.finfo(torch.bfloat16).eps


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)


def places(x: torch.Tensor) -> torch.Tensor:
    """Return where each value is among all numbers of its format, in their order."""
    code = bits(x).to(torch.int16)
    return torch.where(code < 128, code, 128 - code)


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("form", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [*AWKWARD, *SHAPES[:2]])
def test_casts_are_those_of_the_definition(shape, dtype, form, power_of_2) -> None:
    torch.manual_seed(0)
    mine, theirs = fresh_state(4, "cuda"), fresh_state(4, "cuda")
    for i in range(3):
        x = (torch.randn(shape, device="cuda") * 3 * 1.7**i).to(dtype)
        for state, other in ((None, None), (mine, theirs)):
            got = float8_cast(x, form, state, power_of_2=power_of_2)
            want = cast_reference(
                [x], other, form, row=True, transposed=True, update=True, roll=True, power_of_2=power_of_2
            )
            assert torch.allclose(got.inverse, want[2], rtol=1e-6)
            for a, b in ((got.row, want[0]), (got.transposed, want[1])):
                assert a.shape == b.shape
                # Scales that are no powers of two may differ in their last bit, and so a value that lies in the middle.
                different = (bits(a) != bits(b)).double().mean() if a.numel() else 0.0
                assert different <= (0.0 if power_of_2 else 1e-5)
        assert torch.allclose(mine, theirs, rtol=1e-6)


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("shape", [*AWKWARD, *SHAPES[:2]])
def test_casts_multiply_factors_in(shape, delayed) -> None:
    torch.manual_seed(0)
    mine, theirs = (fresh_state(4, "cuda") if delayed else None for _ in range(2))
    rows, columns = torch.rand(shape[0], device="cuda") + 0.1, torch.randn(shape[1], device="cuda").bfloat16()
    for i in range(3):
        x = (torch.randn(shape, device="cuda") * 1.7**i).bfloat16()
        got = float8_cast(x, E4M3, mine, factors=(rows, columns))
        want = cast_reference(
            [x], theirs, E4M3, row=True, transposed=True, update=True, roll=True, row_factor=rows, column_factor=columns
        )
        assert torch.allclose(got.inverse, want[2], rtol=1e-6)
        for a, b in ((got.row, want[0]), (got.transposed, want[1])):
            moved = (places(a) - places(b)).abs()
            assert moved.numel() == 0 or int(moved.max()) <= 1  # products of three are rounded in another order


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("shape", [*AWKWARD, *SHAPES[:2]])
def test_casts_by_row_are_those_of_the_definition(shape, power_of_2) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape, device="cuda") * torch.logspace(-2, 2, shape[0], device="cuda")[:, None]).bfloat16()
    got = float8_cast(x, E4M3, by_row=True, power_of_2=power_of_2)
    row, turned, inverse, turned_inverse = cast_rows_reference(
        [x], E4M3, row=True, transposed=True, power_of_2=power_of_2
    )
    assert torch.allclose(got.inverse, inverse, rtol=1e-6)
    assert torch.allclose(got.turned_inverse, turned_inverse, rtol=1e-6)
    for a, b in ((got.row, row), (got.transposed, turned)):
        assert a.shape == b.shape
        assert a.numel() == 0 or (bits(a) != bits(b)).double().mean() <= (0.0 if power_of_2 else 1e-5)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_first_casts_are_those_with_the_scale_they_find(shape) -> None:
    # Programs begin while the first ones end and write the scale: none may take it for known already.
    x = torch.randn(shape, device="cuda").bfloat16()
    want = float8_cast(x, E4M3)
    gate_up = torch.randn(shape[0], 2 * shape[1], device="cuda").bfloat16()
    options = (E5M2, E4M3, "silu", True, True, True, True)
    inverse = torch.ones(1, device="cuda")
    gated = float8_gated_mlp_backward_op(x, gate_up, None, inverse, *options)
    for _ in range(100):
        got = float8_cast(x, E4M3, fresh_state(16, "cuda"))
        assert torch.equal(bits(got.row), bits(want.row))
        assert torch.equal(bits(got.transposed), bits(want.transposed))
        again = float8_gated_mlp_backward_op(x, gate_up, fresh_state(16, "cuda"), inverse, *options)
        assert all(torch.equal(bits(a.contiguous()), bits(b.contiguous())) for a, b in zip(again, gated, strict=True))


def test_what_is_not_finite_shows() -> None:
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    state = fresh_state(4, "cuda")
    float8_cast(x, E4M3, state)
    known = state.clone()
    x[3, 5], x[4, 6] = float("inf"), float("nan")
    got = float8_cast(x, E4M3, state)
    values = got.row.float()
    assert values[3, 5].isnan()
    assert values[4, 6].isnan()
    assert int(values.isnan().sum()) == 2
    assert float8_cast(x, E4M3).inverse.isnan().all()
    x[3, 5] = x[4, 6] = 0.0
    again = float8_cast(x, E4M3, state)
    assert torch.isfinite(again.row.float()).all()
    assert state[2] == known[2]  # an amax of NaN does not enter the history


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 16), (70, 144), (300, 4096), (2048, 14336), (0, 16)])
def test_gated_activations_are_the_definition(shape, activation, delayed) -> None:
    torch.manual_seed(0)
    rows, columns = shape
    mine, theirs = ([fresh_state(4, "cuda") if delayed else None for _ in range(2)] for _ in range(2))
    for i in range(3):
        gate_up = (torch.randn(rows, 2 * columns, device="cuda") * 1.5**i).bfloat16()
        grad = (torch.randn(shape, device="cuda") * 1e-4).bfloat16()
        row, inverse = float8_gated_mlp_op(gate_up, mine[0], E4M3, activation, "forward", True)
        got = float8_gated_mlp_backward_op(
            grad, gate_up, mine[1], inverse, E5M2, E4M3, activation, True, True, True, True
        )
        want_row, want_inverse = forward_reference(
            gate_up, theirs[0], E4M3, activation, update=True, roll=True, power_of_2=True
        )
        want = backward_reference(
            grad, gate_up, theirs[1], want_inverse, (E5M2, E4M3), activation, row=True, transposed=True, again=True,
            power_of_2=True,
        )  # fmt: skip
        assert torch.equal(inverse, want_inverse)
        assert torch.equal(got[2], want[2])
        for a, b in ((row, want_row), (got[0], want[0]), (got[1], want[1]), (got[3], want[3])):
            assert a.shape == b.shape
            # The two compute sigmoid and error function otherwise in the last bits, and what lies in the middle may
            # fall apart: to the next number, and seldom.
            apart = (places(a) - places(b)).abs()
            # About zero two forms of the error function part by more than a number of FP8.
            near = (a.float() - b.float()).abs() <= 1e-6 * torch.finfo(a.dtype).max
            assert a.numel() == 0 or (bool(((apart <= 1) | near).all()) and apart.double().mean() < 2e-3)
        for a, b in zip(mine, theirs, strict=True):
            assert a is None or torch.allclose(a, b, rtol=1e-4)


class SwiGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if not r.by_row])
def test_a_gated_mlp_as_its_layers_apart(name) -> None:
    torch.manual_seed(0)
    model = SwiGLU(1024, 2816).to("cuda", torch.bfloat16)
    apart, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    swap_mlp(model, (model.gate, model.up, model.down), "silu", name)
    for layer in (apart.gate, apart.up, apart.down):
        swap_linear(layer, name)
    for _ in range(2):
        x = torch.randn(500, 1024, device="cuda", dtype=torch.bfloat16)
        leaves = [x.clone().requires_grad_(), x.clone().requires_grad_(), x.double().requires_grad_()]
        models = (model, apart, exact)
        dy = torch.randn(500, 1024, device="cuda", dtype=torch.bfloat16)
        outs = []
        for one, leaf in zip(models, leaves, strict=True):
            one.zero_grad()
            outs.append(one(leaf))
            outs[-1].backward(dy.to(outs[-1].dtype))
        found = []
        for i in (0, 1):
            pairs = [(outs[i], outs[2]), (leaves[i].grad, leaves[2].grad)]
            pairs += [(p.grad, q.grad) for p, q in zip(models[i].parameters(), exact.parameters(), strict=True)]
            found.append([error(a.detach(), b.detach()) for a, b in pairs])
        # As close to fp64 as the layers apart, which round to bfloat16 between: the same formats' error.
        assert all(a < 1.05 * b for a, b in zip(*found, strict=True)), found


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("form", [E4M3, E5M2])
def test_products_are_exact_on_their_operands(form, fast) -> None:
    torch.manual_seed(0)
    a = float8_cast(torch.randn(512, 4096, device="cuda"), form, transposed=False)
    b = float8_cast(torch.randn(384, 4096, device="cuda"), E4M3, transposed=False)
    bias = torch.randn(384, device="cuda", dtype=torch.bfloat16)
    got = float8_matmul(a.row, b.row, a.inverse, b.inverse, bias=bias, fast=fast)
    want = (a.row.double() @ b.row.double().t()) * (a.inverse.double() * b.inverse.double()) + bias.double()
    assert error(got, want) < (EPS if fast else EPS / 2)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300))


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("sizes", LAYERS)
def test_a_layer_is_exact_on_its_operands(sizes, recipe) -> None:
    inside, outside = sizes
    torch.manual_seed(0)
    layer = nn.Linear(inside, outside, bias=False, device="cuda", dtype=torch.bfloat16)
    site = swap_linear(layer, recipe)
    for i in range(2):
        x = torch.randn(4, TOKENS // 4, inside, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn(4, TOKENS // 4, outside, device="cuda", dtype=torch.bfloat16) * 1e-6 * 2**i
        layer.zero_grad()
        y = layer(x)
        y.backward(dy)
        rows = slice(0, None, 16)
        flat, dflat = x.detach().flatten(0, 1), dy.flatten(0, 1)
        weight = layer.weight.detach()
        want = multiplied(flat, site, "input", summed=1)[rows] @ multiplied(weight, site, "weight", summed=1).t()
        assert error(y.detach().flatten(0, 1)[rows], want) < EPS
        want = multiplied(dflat, site, "gradient", summed=1)[rows] @ multiplied(weight, site, "weight", summed=0)
        assert error(x.grad.flatten(0, 1)[rows], want) < EPS / 2
        left, right = dflat.double(), flat.double()
        if site.recipe.weight_gradient.float8:
            left = multiplied(dflat, site, "gradient", summed=0)
            right = multiplied(flat, site, "input", summed=0)
        assert error(layer.weight.grad, left.t() @ right) < EPS / 2
        del want, left, right


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_compiled_as_eager(recipe) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 256)).to("cuda", torch.bfloat16)
    for layer in (model[0], model[2]):
        swap_linear(layer, recipe)
    other = copy.deepcopy(model)
    run = torch.compile(other, fullgraph=True)
    for i in range(3):
        x = torch.randn(300, 512, device="cuda", dtype=torch.bfloat16) * (1 + i)
        dy = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
        y, z = model(x), run(x)
        model.zero_grad()
        other.zero_grad()
        y.backward(dy)
        z.backward(dy)
        assert error(z, y) < 4 * EPS
        for a, b in zip(other.parameters(), model.parameters(), strict=True):
            assert error(a.grad, b.grad) < 0.05  # a rounding of the activation flips some of the next cast


def test_compiled_after_a_norm_as_eager() -> None:
    """Compiled, the cast computes the norm, and copies for the backward are made there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.RMSNorm(512, eps=1e-6), nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 256))
    model.to("cuda", torch.bfloat16)
    given = torch.randn(300, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    convert(model, "tensorwise_delayed", example_inputs=(given.detach(),))
    assert site_of(model[1]).normed is not None
    other = copy.deepcopy(model)
    run = torch.compile(other, fullgraph=True)
    for i in range(3):
        x, twin = ((given.detach() * (1 + i)).requires_grad_() for _ in range(2))
        dy = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
        y, z = model(x), run(twin)
        model.zero_grad()
        other.zero_grad()
        y.backward(dy)
        z.backward(dy)
        assert error(z, y) < 0.05  # eager rounds the norm before the cast, which sends some values to the next number
        for a, b in ((twin, x), *zip(other.parameters(), model.parameters(), strict=True)):
            assert error(a.grad, b.grad) < 0.05


def test_a_checkpoint_casts_the_same_again() -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    layer = nn.Linear(256, 256, device="cuda", dtype=torch.bfloat16)
    plain = copy.deepcopy(layer)
    sites = [swap_linear(one, "tensorwise_delayed") for one in (layer, plain)]
    for i in range(3):
        x = (torch.randn(64, 256, device="cuda", dtype=torch.bfloat16) * 1.5**i).requires_grad_()
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        plain(x.detach()).sum().backward()
        for operand, state in sites[0].states.items():
            assert torch.equal(state, sites[1].states[operand]), operand


def test_a_graph_replays_the_moving_scales() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(256, 256, device="cuda", dtype=torch.bfloat16)
    site = swap_linear(layer, "tensorwise_delayed")
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(x).sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    site.forget_weight()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for factor in (4.0, 1.0):
        x.mul_(factor)
        graph.replay()
        graph.replay()
    small = float8_cast(x, E4M3, site.states["input"], role="read", transposed=False)
    weight = float8_cast(layer.weight.detach(), E4M3, site.states["weight"], role="read", transposed=False)
    want = (small.row.double() @ weight.row.double().t()) * small.inverse.double() * weight.inverse.double()
    assert error(y, want + layer.bias.double()) < 4 * EPS


@pytest.mark.parametrize("recipe", ["tensorwise_delayed", "rowwise"])
def test_a_monitor_counts_on_the_gpu_what_a_cpu_counts_and_reads_it_later(recipe: str) -> None:
    counted = []
    for device in ("cuda", "cpu"):
        torch.manual_seed(0)
        layer = nn.Linear(256, 512, bias=False).to(device, torch.bfloat16)
        swap_linear(layer, recipe)
        x = (torch.randn(1024, 256) * 100).to(device, torch.bfloat16)
        with Monitor(layer, every=1, bounds=None) as monitor:
            layer(x).float().square().mean().backward()
            monitor.step()
        # Gradients of the two products differ in their last bits.
        counted.append({r.operand: (r.elements, r.saturated, r.flushed, r.amax) for r in monitor.readings})
    assert counted[0]["input"] == counted[1]["input"]
    assert counted[0]["weight"] == counted[1]["weight"]
    assert counted[0]["gradient"] == pytest.approx(counted[1]["gradient"], rel=0.05, abs=1e-3)
