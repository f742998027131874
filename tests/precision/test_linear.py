"""Linear layers in FP8 on the CPU: emulated products, exact on the operands that the recipe casts."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import InputsError
from kernel_pytorch.precision.emulate import multiplied
from kernel_pytorch.precision.linear import Float8Linear, restore_linear, swap_linear, swap_linears
from kernel_pytorch.precision.observe import observe
from kernel_pytorch.precision.recipes import RECIPES, Product, Recipe, recipe_named
from kernel_pytorch.precision.site import site_of, sites_of

NAMES = list(RECIPES)


PRODUCT_OF = {
    ("input", 1): "forward", ("weight", 1): "forward", ("gradient", 1): "input_gradient",
    ("weight", 0): "input_gradient", ("gradient", 0): "weight_gradient", ("input", 0): "weight_gradient",
}  # fmt: skip


def seen(flat: dict[str, torch.Tensor], site, which: str, summed: int) -> torch.Tensor:
    """Return what is multiplied in the place of an operand, in fp64."""
    product = getattr(site.recipe, PRODUCT_OF[which, summed])
    return multiplied(flat[which], site, which, summed=summed) if product.float8 else flat[which].double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_three_products_are_exact_on_their_operands(name, dtype, bias) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 32, bias=bias, dtype=dtype)
    site = swap_linear(layer, name)
    for i in range(3):
        x = (torch.randn(3, 7, 48) * (1 + i)).to(dtype).requires_grad_()
        dy = (torch.randn(3, 7, 32) * 1e-5).to(dtype)
        layer.zero_grad()
        y = layer(x)
        y.backward(dy)
        flat = {"input": x.detach().flatten(0, 1), "weight": layer.weight.detach(), "gradient": dy.flatten(0, 1)}
        want_y = seen(flat, site, "input", 1) @ seen(flat, site, "weight", 1).t() + (
            layer.bias.detach().double() if bias else 0
        )
        unit = 2 * torch.finfo(dtype).eps
        for got, want in (
            (y.detach().flatten(0, 1), want_y),
            (x.grad.flatten(0, 1), seen(flat, site, "gradient", 1) @ seen(flat, site, "weight", 0)),
            (layer.weight.grad, seen(flat, site, "gradient", 0).t() @ seen(flat, site, "input", 0)),
        ):
            assert got.dtype == dtype
            assert (got.double() - want).norm() <= unit * want.norm()
        if bias:
            assert torch.allclose(layer.bias.grad, dy.flatten(0, 1).sum(0), rtol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_the_error_is_that_of_the_formats(name) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(256, 256, bias=False, dtype=torch.float64)
    x = torch.randn(128, 256, dtype=torch.float64)
    want = layer(x).detach()
    swap_linear(layer, name)
    error = float((layer(x).detach() - want).norm() / want.norm())
    assert 0.02 < error < 0.06  # two operands, each rounded to four bits: 2^-4 / sqrt(3) at most


@pytest.mark.parametrize("place", ["forward", "input_gradient", "weight_gradient"])
def test_a_product_may_keep_its_precision(place) -> None:
    torch.manual_seed(0)
    recipe = replace(RECIPES["tensorwise_current"], name="mixed", **{place: Product(float8=False)})
    layer = nn.Linear(64, 64, bias=False, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    swap_linear(layer, recipe)
    x = torch.randn(32, 64, dtype=torch.float64, requires_grad=True)
    other, dy = x.detach().clone().requires_grad_(), torch.randn(32, 64, dtype=torch.float64)
    y, z = layer(x), plain(other)
    y.backward(dy)
    z.backward(dy)
    pairs = {
        "forward": (y, z),
        "input_gradient": (x.grad, other.grad),
        "weight_gradient": (layer.weight.grad, plain.weight.grad),
    }
    for name, (got, want) in pairs.items():
        assert bool((got - want).norm() <= 1e-12 * want.norm()) == (name == place)


def test_class_keys_copies_and_undo() -> None:
    layer = nn.Linear(32, 16)
    keys = list(layer.state_dict())
    x = torch.randn(4, 32)
    plain = layer(x)
    site = swap_linear(layer, "tensorwise_delayed")
    assert type(layer) is nn.Linear
    assert list(layer.state_dict()) == keys
    first = layer(x)
    assert not torch.equal(first, plain)
    twin = copy.deepcopy(layer)
    assert site_of(twin) is not site
    assert site_of(twin).states["input"].data_ptr() != site.states["input"].data_ptr()
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), plain)  # pickling drops the swap
    restore_linear(layer)
    assert torch.equal(layer(x), plain)
    assert [path for path, _, _ in sites_of(nn.Sequential(layer, twin))] == ["1"]


def test_the_class_saves_and_loads_as_nn_linear() -> None:
    ours, theirs = Float8Linear(32, 16, recipe="tensorwise_current"), nn.Linear(32, 16)
    buffer = io.BytesIO()
    torch.save(theirs.state_dict(), buffer)
    buffer.seek(0)
    ours.load_state_dict(torch.load(buffer))
    x = torch.randn(3, 32)
    error = (ours(x) - theirs(x)).norm() / theirs(x).norm()
    assert 0.01 < error < 0.08
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), ours(x))


def casts(monkeypatch) -> list[tuple[tuple[int, ...], str]]:
    """Record the shape and role of every cast."""
    from kernel_pytorch.ops.float8_cast import op, reference

    seen: list[tuple[tuple[int, ...], str]] = []

    def counted(real):
        def cast(xs, *args, **kwargs):
            role = "moves" if kwargs.get("roll") else "stays"
            seen.append((tuple(torch.cat(xs, kwargs["axis"]).shape), role))
            return real(xs, *args, **kwargs)

        return cast

    for name in ("cast_reference", "cast_rows_reference"):
        monkeypatch.setattr(reference, name, counted(getattr(reference, name)))
    assert op.float8_cast_op is not None
    return seen


@pytest.mark.parametrize("fused", [False, True])
def test_the_weight_is_cast_once_an_optimizer_step(monkeypatch, fused) -> None:
    layer = nn.Linear(32, 16)
    swap_linear(layer, "tensorwise_delayed")
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    seen = casts(monkeypatch)
    for _ in range(2):
        for _ in range(3):
            layer(torch.randn(4, 32, requires_grad=True)).sum().backward()
        optimizer.step()
    assert sum(shape == (16, 32) for shape, _ in seen) == 2


def test_evaluation_sees_what_a_fused_optimizer_wrote() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 16)
    swap_linear(layer, "tensorwise_current")
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.5, fused=True)
    x = torch.randn(4, 32)
    with torch.no_grad():
        layer(x)
    layer(x).sum().backward()
    optimizer.step()
    fresh = nn.Linear(32, 16)
    fresh.load_state_dict(layer.state_dict())
    swap_linear(fresh, "tensorwise_current")
    with torch.no_grad():
        assert torch.equal(layer(x), fresh(x))


def test_a_new_weight_is_seen() -> None:
    layer = nn.Linear(32, 16, bias=False)
    swap_linear(layer, "tensorwise_current")
    x = torch.randn(4, 32)
    y = layer(x)
    with torch.no_grad():
        layer.weight.mul_(-2.0)
    assert torch.equal(layer(x), -2 * y)
    layer.load_state_dict({"weight": torch.zeros(16, 32)})
    assert not layer(x).any()


def test_frozen_weights_have_no_gradient_and_no_transposed_input(monkeypatch) -> None:
    layer = nn.Linear(32, 16)
    swap_linear(layer, "tensorwise_delayed")
    layer.weight.requires_grad_(False)
    x = torch.randn(4, 32, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None
    assert layer.bias.grad is not None
    seen = casts(monkeypatch)
    layer.requires_grad_(False)
    with torch.no_grad():
        layer(x)
    assert [role for _, role in seen] == ["stays"]


def test_a_checkpoint_moves_scales_once() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 16)
    plain = copy.deepcopy(layer)
    mine, theirs = swap_linear(layer, "tensorwise_delayed"), swap_linear(plain, "tensorwise_delayed")
    for i in range(3):
        x = (torch.randn(8, 32) * 2.0**i).requires_grad_()
        other = x.detach().clone().requires_grad_()
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        plain(other).sum().backward()
        assert torch.equal(x.grad, other.grad)
        assert torch.equal(layer.weight.grad, plain.weight.grad)
        for name, state in mine.states.items():
            assert torch.equal(state, theirs.states[name]), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo and Inductor use what is deprecated
@pytest.mark.parametrize("name", NAMES)
def test_compiled_whole_as_eager(name) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16))
    for layer in (model[0], model[2]):
        swap_linear(layer, name)
    twin = copy.deepcopy(model)
    run = torch.compile(twin, fullgraph=True)
    for i in range(3):
        x = (torch.randn(5, 32) * (1 + i)).requires_grad_()
        other = x.detach().clone().requires_grad_()
        model.zero_grad()
        twin.zero_grad()
        y, z = model(x), run(other)
        dy = torch.randn_like(y)
        y.backward(dy)
        z.backward(dy)
        for a, b in (
            (z, y),
            (other.grad, x.grad),
            *((p.grad, q.grad) for p, q in zip(twin.parameters(), model.parameters(), strict=True)),
        ):
            assert (a - b).norm() <= 1e-5 * b.norm()
    for (_, _, mine), (_, _, theirs) in zip(sites_of(model), sites_of(twin), strict=True):
        for operand_, state in mine.states.items():
            if operand_ != "weight":  # compiled code casts the weight at each call, eager code once
                assert torch.allclose(state, theirs.states[operand_], rtol=1e-5), operand_


class Attention(nn.Module):
    """Three layers that read one tensor, and a fourth."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 64), nn.Linear(32, 16, bias=False), nn.Linear(32, 16)
        self.out = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out(q * torch.sigmoid(k.repeat(1, 1, 4)) + v.repeat(1, 1, 4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_layers_that_share_an_input_are_one(name, compiled, monkeypatch) -> None:
    torch.manual_seed(0)
    model = Attention()
    apart = copy.deepcopy(model)
    seen = observe(model, Call((torch.randn(2, 5, 32),)), [model.q, model.k, model.v, model.out])
    assert seen.groups == [[model.q, model.k, model.v], [model.out]]
    assert seen.rows[id(model.q)] == 10
    site = swap_linears(seen.groups[0], name)
    swap_linear(model.out, name)
    for layer in (apart.q, apart.k, apart.v, apart.out):
        swap_linear(layer, name)
    run = torch.compile(model, fullgraph=True) if compiled else model
    for _ in range(3):
        x = torch.randn(2, 5, 32).requires_grad_()
        other = x.detach().clone().requires_grad_()
        model.zero_grad()
        apart.zero_grad()
        counted = casts(monkeypatch)
        y = run(x)
        dy = torch.randn_like(y)
        y.backward(dy)
        shapes = [shape for shape, _ in counted]
        assert shapes.count((10, 32)) == 2  # the input of three layers, and the gradient of the last
        assert shapes.count((10, 96)) == 1  # the gradients of three
        monkeypatch.undo()
        apart(other).backward(dy)
        pairs = [
            (x.grad, other.grad),
            *((p.grad, q.grad) for p, q in zip(model.parameters(), apart.parameters(), strict=True)),
        ]
        for got, want in pairs:
            # Apart they have scales of their own: powers of two, which round alike, but one sum here was two.
            assert (got - want).norm() <= 0.1 * want.norm()
        assert site.pending is None


def test_a_member_that_is_called_alone_computes_its_own() -> None:
    torch.manual_seed(0)
    model = Attention()
    swap_linears([model.q, model.k, model.v], "tensorwise_current")
    x = torch.randn(4, 32)
    q = model.q(x)
    other = torch.randn(4, 32)
    assert not torch.equal(model.k(other), model.k(x))
    x.add_(1.0)
    assert not torch.equal(model.q(x), q)  # what was left for the same tensor is of its values before
    with torch.no_grad():
        assert not model.v(x).requires_grad


def test_autocast_decides_the_result() -> None:
    layer = nn.Linear(32, 16)
    swap_linear(layer, "tensorwise_current")
    x = torch.randn(4, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype is torch.float32
    assert layer.weight.grad.dtype is torch.float32


def test_tied_weights_share_their_gradient() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
    second.weight = first.weight
    plain = copy.deepcopy(nn.ModuleList([first, second]))
    assert plain[0].weight is plain[1].weight
    for layer in (first, second):
        swap_linear(layer, "tensorwise_current")
    x = torch.randn(64, 32)
    second(first(x)).sum().backward()
    plain[1](plain[0](x)).sum().backward()
    cosine = torch.nn.functional.cosine_similarity(first.weight.grad.flatten(), plain[0].weight.grad.flatten(), dim=0)
    assert cosine > 0.98


def test_recipes_that_no_tensor_core_runs_are_refused() -> None:
    for formats in (
        {"input_format": "e5m2"},
        {"weight_format": "e5m2"},
        {"gradient_format": "int8"},
        {"history": 3},
    ):
        with pytest.raises(InputsError, match="recipe odd"):
            replace(RECIPES["tensorwise_delayed"], name="odd", **formats)
    with pytest.raises(InputsError, match="no FP8 recipe"):
        recipe_named("tensorwise")
    assert isinstance(recipe_named(RECIPES[NAMES[0]]), Recipe)
