"""The layout in which the gradient of attention's output arrives: cuDNN by PyTorch 2.11 mistakes others."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from kernel_pytorch.attention import AttentionShape, gradient_layout
from kernel_pytorch.attention.gradient_layout import in_layout, keep_layout, with_gradient_in_layout
from kernel_pytorch.attention.probe import make_case, relative_errors
from kernel_pytorch.attention.reference import attend


class Watched(torch.autograd.Function):
    """The identity that notes the strides of its gradient."""

    seen: ClassVar[list[tuple[int, ...]]] = []

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        Watched.seen.append(gradient.stride())
        return gradient


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    Watched.seen.clear()


def turned(*shape: int) -> torch.Tensor:
    batch, heads, tokens, size = shape
    return torch.randn(batch, tokens, heads, size).transpose(1, 2)


def test_a_gradient_in_another_layout_is_copied_and_one_in_the_same_is_not() -> None:
    x = turned(2, 3, 5, 4)
    assert in_layout(x).data_ptr() == x.data_ptr()
    other = in_layout(x.contiguous())
    assert other.stride() == x.stride()
    assert torch.equal(other, x)
    assert torch.equal(in_layout(torch.ones(1).expand(2, 3, 5, 4)), torch.ones(2, 3, 5, 4))


@pytest.mark.parametrize("make", [turned, torch.randn])
def test_the_hook_brings_gradients_into_one_layout(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    """Also where queries, and so the output, have another: eager code and compiled code lay them out differently."""
    monkeypatch.setattr(gradient_layout, "_needed", lambda device: True)
    x = make(2, 3, 5, 4).requires_grad_()

    class OnGpu(torch.Tensor):
        is_cuda = True

    out, weight = Watched.apply(x * 1.0).as_subclass(OnGpu), torch.randn(2, 3, 5, 4)
    (keep_layout(out) * weight).sum().backward()
    assert Watched.seen == [turned(2, 3, 5, 4).stride()]
    assert torch.allclose(x.grad, weight)


@pytest.mark.parametrize("packed", [False, True])
def test_a_probe_differentiates_as_a_model_does(packed: bool) -> None:
    shape = AttentionShape(2, 4, 2, 32, 32, 8, dtype=torch.float32, is_causal=True, packed=packed).canonical()
    case = make_case(shape, torch.device("cpu"), backward=True)
    strides = []

    def run(case: Any) -> torch.Tensor:
        inputs = [t.unflatten(0, (2, 32)).transpose(1, 2) if packed else t for t in case.inputs()]
        out = attend(*inputs, right=0).transpose(1, 2).contiguous()
        out = out.flatten(0, 1) if packed else out.transpose(1, 2)
        strides.append(out.stride())
        return Watched.apply(out)

    errors = relative_errors(case, run, backward=True)
    assert max(errors.values()) < 1e-5
    assert Watched.seen == strides


SEEN: list[tuple[int, ...]] = []

_library = torch.library.Library("kernel_pytorch_test_layout", "FRAGMENT")
_library.define("twice(Tensor x) -> Tensor")
_library.define("twice_backward(Tensor gradient) -> Tensor")


def _twice(x):
    return x * 2


def _twice_backward(gradient):
    SEEN.append(gradient.stride())
    return gradient * 2


_library.impl("twice", _twice, "CompositeExplicitAutograd")
_library.impl("twice_backward", _twice_backward, "CompositeExplicitAutograd")
torch.library.register_fake("kernel_pytorch_test_layout::twice", lambda x: x * 2, lib=_library)
torch.library.register_fake("kernel_pytorch_test_layout::twice_backward", lambda g: g * 2, lib=_library)
torch.library.register_autograd(
    "kernel_pytorch_test_layout::twice",
    lambda ctx, grad: torch.ops.kernel_pytorch_test_layout.twice_backward(grad),
    lib=_library,
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("like_models", [True, False])
def test_a_gradient_of_another_layout_is_turned(like_models, compiled, kept) -> None:
    def run(x):
        # `[batch, tokens, heads, size]` in memory, as attention's output is; its gradient comes as `[b, h, t, s]`.
        x = x.transpose(1, 2)
        out = torch.ops.kernel_pytorch_test_layout.twice(x if like_models else x.contiguous())
        out = with_gradient_in_layout(out) if kept else out
        return (out.contiguous() * weight).sum()

    weight = torch.randn(2, 3, 5, 4)
    x = torch.randn(2, 5, 3, 4, requires_grad=True)
    SEEN.clear()
    call = torch.compile(run, fullgraph=True) if compiled else run
    (grad,) = torch.autograd.grad(call(x), x)
    assert torch.allclose(grad, 2 * weight.transpose(1, 2))
    (strides,) = SEEN
    assert (strides == x.transpose(1, 2).stride()) is kept
