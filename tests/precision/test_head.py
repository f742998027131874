"""The loss of a head in FP8 by chunks: what the layer and the loss after it compute; scales move once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kernel_pytorch.ops.float8_cast.counting import COLUMNS, Column, switch
from kernel_pytorch.precision.gathered import GatheredWeight
from kernel_pytorch.precision.head import float8_head_loss, unchunked
from kernel_pytorch.precision.linear import swap_linear, swap_linears
from kernel_pytorch.precision.recipes import Product, recipe_named
from kernel_pytorch.precision.site import Site, site_of

ROWS, WIDTH, WORDS, IGNORED = 80, 32, 96, -100
TENSORWISE = ["tensorwise_delayed", "tensorwise_current"]


def head(recipe: str = "tensorwise_delayed", dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, WORDS, bias=bias, dtype=dtype)
    swap_linear(layer, recipe)
    return layer


def batch(i: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and labels; 64 rows count, so that a mean is exact. Those of the first chunk of 16 do not."""
    made = torch.Generator().manual_seed(i)
    x = (torch.randn(ROWS, WIDTH, generator=made) * (1 + i)).to(dtype).requires_grad_()
    labels = torch.randint(0, WORDS, (ROWS,), generator=made)
    labels[:16] = IGNORED
    return x, labels


def of_layer(layer: nn.Linear, x: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    return F.cross_entropy(layer(x).float(), labels, reduction=reduction)


def by_chunks(
    layer: nn.Linear, x: torch.Tensor, labels: torch.Tensor, reduction: str = "mean", chunk: int | None = None
) -> torch.Tensor:
    return float8_head_loss(x, place(layer), labels, reduction=reduction, chunk=chunk)


def place(layer: nn.Linear) -> Site:
    site = site_of(layer)
    assert site is not None
    return site


def trained(layer: nn.Linear, loss, steps: int = 3, factor: float = 0.5, **options) -> list[torch.Tensor]:
    """Return loss and gradients of the last of some steps."""
    for i in range(steps):
        x, labels = batch(i, layer.weight.dtype)
        layer.zero_grad()
        value = loss(layer, x, labels, **options)
        (value * factor).backward()
    return [value.detach(), x.grad, *(p.grad for p in layer.parameters())]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.dtype == want.dtype
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", TENSORWISE)
def test_in_one_chunk_it_is_the_layer_and_its_loss(recipe, dtype, bias, reduction) -> None:
    want = trained(head(recipe, dtype, bias=bias), of_layer, reduction=reduction)
    got = trained(head(recipe, dtype, bias=bias), by_chunks, reduction=reduction)
    # Casts of equal numbers are equal; sums differ in their order, and 16 bits are rounded to once.
    for mine, theirs in zip(got, want, strict=True):
        assert error(mine, theirs) < max(1e-6, torch.finfo(dtype).eps / 4)


@pytest.mark.parametrize("chunk", [16, 40, 64])
@pytest.mark.parametrize("recipe", TENSORWISE)
def test_several_chunks_sum_the_same_shares(recipe: str, chunk: int) -> None:
    """A delayed scale is one for all chunks; of powers of two also those by each chunk round alike."""
    whole, parts = head(recipe), head(recipe)
    want, got = trained(whole, of_layer), trained(parts, by_chunks, chunk=chunk)
    for mine, theirs in zip(got, want, strict=True):
        assert error(mine, theirs) < 1e-6
    # Rounding to E5M2, which the numbers above are free of, would be 2**-3 of each slope.
    x, labels = batch(2)
    exact = torch.autograd.grad(F.cross_entropy(F.linear(x, whole.weight, whole.bias), labels) * 0.5, x)[0]
    assert error(got[1], exact) > 1e-2


def test_of_many_chunks_shares_are_added_in_float32() -> None:
    rows, dtype = 16 * 64, torch.bfloat16
    made = torch.Generator().manual_seed(3)
    x, labels = torch.randn(rows, WIDTH, generator=made).to(dtype), torch.randint(0, WORDS, (rows,), generator=made)
    found = []
    for chunk in (None, 16):
        layer = head("tensorwise_current", dtype)
        by_chunks(layer, x, labels, chunk=chunk).backward()
        found.append(layer.weight.grad)
    # Shares round to bf16 independently; 64 sums in bf16 would each add a rounding of the whole.
    assert error(found[1], found[0]) < torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("chunk", [None, 16])
def test_scales_move_once_a_step_and_know_all_chunks(chunk: int | None) -> None:
    whole, parts = head(), head()
    for steps in (1, 3):
        trained(whole, of_layer, steps, factor=1.0)  # slopes are noted before what comes from outside
        trained(parts, by_chunks, steps, factor=1.0, chunk=chunk)
        for operand, state in place(whole).states.items():
            if operand != "gradient":
                assert torch.allclose(place(parts).states[operand], state, rtol=1e-6), operand
        assert int(place(parts).states["input"][0]) == {1: 0, 3: 3}[steps]
        # Of slopes the largest is known before: nothing is noted.
        assert not place(parts).states["gradient"].any()
    before = {k: v.clone() for k, v in place(parts).states.items()}
    with torch.no_grad():
        x, labels = batch(5)
        got = by_chunks(parts, x, labels, chunk=chunk)
        assert torch.allclose(got, of_layer(whole, x, labels))
    assert all(torch.equal(before[k], v) for k, v in place(parts).states.items())


def test_a_checkpoint_that_computes_it_again_moves_no_scale() -> None:
    plain, again = head(), head()
    want = trained(plain, by_chunks, chunk=32)
    got = trained(again, lambda *a, **k: checkpoint(by_chunks, *a, use_reentrant=False, **k), chunk=32)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for operand, state in place(plain).states.items():
        # What it casts again is noted again: the magnitude is the same.
        assert torch.equal(place(again).states[operand], state), operand


@pytest.mark.parametrize("frozen", ["weight", "input", "bias", "all"])
def test_only_what_requires_gradients_gets_them(frozen: str) -> None:
    found = []
    for loss in (of_layer, by_chunks):
        layer = head()
        x, labels = batch(0)
        for name, tensor in (("weight", layer.weight), ("bias", layer.bias), ("input", x)):
            tensor.requires_grad_(frozen not in (name, "all"))
        value = loss(layer, x, labels)
        assert value.requires_grad is (frozen != "all")
        if frozen != "all":
            value.backward()
        found.append((layer.weight.grad, layer.bias.grad, x.grad))
    for theirs, mine in zip(*found, strict=True):
        assert (mine is None) is (theirs is None)
        assert mine is None or error(mine, theirs) < 1e-6


def test_half_precision_survives_a_mean_over_many_rows() -> None:
    rows = 1 << 14
    made = torch.Generator().manual_seed(1)
    x = (0.1 * torch.randn(rows, WIDTH, generator=made)).half().requires_grad_()
    labels = torch.randint(0, WORDS, (rows,), generator=made)
    layer = head("tensorwise_current", torch.float16)
    (by_chunks(layer, x, labels) * 2.0**14).backward()
    exact = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    (F.cross_entropy(F.linear(*exact), labels) * 2.0**14).backward()
    assert error(layer.bias.grad.double(), exact[2].grad) < 0.05
    assert error(x.grad.double(), exact[0].grad) < 0.1


def test_a_monitor_counts_what_it_counted_before() -> None:
    counted = []
    for loss in (of_layer, lambda *a: by_chunks(*a, chunk=16)):
        layer = head()
        counters = torch.zeros(3, COLUMNS, dtype=torch.float64)
        place(layer).counters = dict(zip(("input", "weight", "gradient"), counters, strict=True))
        switch(counters, on=True)
        trained(layer, loss, steps=1, factor=1.0)
        switch(counters, on=False)
        counted.append(counters)
    assert counted[1][2, Column.ELEMENTS] == ROWS * WORDS
    assert torch.allclose(counted[0], counted[1], rtol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("recipe", TENSORWISE)
def test_compiled_it_is_the_same(recipe: str) -> None:
    eager, layer = head(recipe), head(recipe)
    compiled = torch.compile(lambda *a: by_chunks(*a, chunk=32), backend="aot_eager", fullgraph=True)
    want, got = trained(eager, by_chunks, chunk=32), trained(layer, lambda _, *a: compiled(layer, *a))
    for mine, theirs in zip(got, want, strict=True):
        assert error(mine, theirs) < 1e-6
    if recipe == "tensorwise_delayed":
        # Of a weight that stays the same eager code keeps the cast.
        assert torch.allclose(place(layer).states["input"], place(eager).states["input"], rtol=1e-6)


def test_autocast_makes_logits_of_its_own_dtype() -> None:
    found = []
    for loss in (of_layer, by_chunks):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(trained(head(), loss))
    for theirs, mine in zip(*found, strict=True):
        assert error(mine, theirs) < torch.finfo(torch.bfloat16).eps


def test_no_rows_have_no_gradient() -> None:
    layer = head()
    x = torch.randn(0, WIDTH, requires_grad=True)
    value = by_chunks(layer, x, torch.zeros(0, dtype=torch.int64), reduction="sum")
    value.backward()
    assert value == 0
    assert x.grad.shape == x.shape
    assert layer.weight.grad.count_nonzero() == 0


def test_a_second_backward_is_refused() -> None:
    value = by_chunks(head(), *batch(0))
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward"):
        value.backward()


def test_what_is_not_computed_by_chunks_says_why() -> None:
    assert unchunked(place(head())) == ""
    assert "scales by row" in unchunked(place(head("rowwise")))
    narrow = replace(recipe_named("tensorwise_current"), weight_gradient=Product(float8=False))
    assert "not all products" in unchunked(place(head(narrow)))
    site = swap_linears([nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 32)], "tensorwise_current")
    assert "one with others" in unchunked(site)
    layer = head("tensorwise_current")
    bits = torch.zeros(WORDS, WIDTH, dtype=torch.uint8)
    layer.weight = nn.Parameter(GatheredWeight(bits, torch.ones(1), torch.float8_e4m3fn, torch.float32))
    assert "FSDP" in unchunked(place(layer))
