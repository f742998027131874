"""The loss of a head in FP8 by chunks on the GPU: as right as the layer and its loss, and without their logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kernel_pytorch.ops.float8_matmul import unsupported
from kernel_pytorch.ops.linear_cross_entropy import cross_entropy
from kernel_pytorch.precision.head import float8_head_loss
from kernel_pytorch.precision.linear import swap_linear
from kernel_pytorch.precision.site import site_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
    pytest.mark.skipif(not torch.cuda.is_available() or unsupported("cuda", 16, 16) is not None, reason="no FP8 here"),
]

ROWS, WIDTH, WORDS, CHUNK = 16381, 1024, 32768, 4096


def of_layer(layer: nn.Linear, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(layer(x), labels)


def by_chunks(layer: nn.Linear, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return float8_head_loss(x, site_of(layer), labels, chunk=CHUNK)


def step(loss: Callable[..., torch.Tensor], recipe: str | None, *, measured: bool) -> tuple[list[torch.Tensor], int]:
    """Return loss and gradients of a second step, and the bytes that it held at most beside what was there."""
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, WORDS, bias=False, device="cuda", dtype=torch.bfloat16)
    if recipe is not None:
        swap_linear(layer, recipe).measured = measured
    x = torch.randn(ROWS, WIDTH, device="cuda").bfloat16().requires_grad_()
    labels = torch.randint(0, WORDS, (ROWS,), device="cuda")
    labels[5::7] = -100
    for _ in range(2):
        x.grad = layer.weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value = loss(layer, x, labels)
        value.backward()
        peak = torch.cuda.max_memory_allocated() - before
    return [value.detach(), x.grad, layer.weight.grad], peak


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("recipe", ["tensorwise_delayed", "tensorwise_current"])
def test_it_is_as_right_as_the_layer_and_holds_a_chunk(recipe: str, measured: bool) -> None:
    exact, _ = step(
        lambda layer, x, y: F.cross_entropy(F.linear(x.float(), layer.weight.float()), y), None, measured=False
    )
    whole, most = step(of_layer, recipe, measured=measured)
    parts, least = step(by_chunks, recipe, measured=measured)
    assert error(parts[0], whole[0].float()) < 1e-3
    for mine, theirs, want in zip(parts, whole, exact, strict=True):
        assert error(mine, want) < 1.05 * error(theirs, want) + 1e-3
    # Logits of a chunk and a copy, transposed slopes of all; beside them small copies of input and weight and dx twice.
    small = 3 * WORDS * WIDTH + 6 * ROWS * WIDTH
    assert least < 1.1 * (3 * CHUNK * WORDS + ROWS * WORDS + 2 * WORDS * WIDTH + small)
    assert least < 0.7 * most


def test_what_is_not_a_number_is_none_in_the_gradients() -> None:
    layer = nn.Linear(WIDTH, WORDS, bias=False, device="cuda", dtype=torch.bfloat16)
    swap_linear(layer, "tensorwise_delayed")
    x = torch.randn(512, WIDTH, device="cuda").bfloat16()
    labels = torch.randint(0, WORDS, (512,), device="cuda")
    by_chunks(layer, x, labels).backward()
    assert layer.weight.grad.isfinite().all()
    x[3, 5] = float("nan")
    layer.weight.grad = None
    by_chunks(layer, x, labels).backward()
    assert layer.weight.grad.isnan().all()
