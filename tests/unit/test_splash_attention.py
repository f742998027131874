"""Heads padded for a kernel give the attention of the model's width; the kernel itself is PyTorch's attention here."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from kernel_pytorch.core.program import begin
from kernel_pytorch.core.types import Mode, Step
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms import splash_attention
from kernel_pytorch.transforms.splash_attention import SplashAttention

ROWS = 128


class Attends(nn.Module):
    def __init__(self, width: int, value_width: int, written_out: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(16, 2 * w, dtype=torch.float64) for w in (width, width, value_width))
        self.written_out = written_out

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in self.parts)
        if not self.written_out:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        past = torch.ones(ROWS, ROWS, dtype=torch.bool).tril()
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).masked_fill(~past, float("-inf")).softmax(-1) @ v


@pytest.fixture
def widths(monkeypatch):
    """Stand in for the kernel, and note the widths of heads that it is given."""
    seen = []

    def kernel(query, key, value, causal, scale):
        seen.append((query.shape[-1], key.shape[-1], value.shape[-1]))
        return functional.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)

    monkeypatch.setattr(splash_attention, "_kernel", kernel)
    return seen


def results(call, model):
    model.zero_grad()
    x = torch.randn(3, ROWS, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    value = call(x)
    value.square().sum().backward()
    return [value.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize(
    ("width", "value_width", "pad", "given"),
    [
        (80, 80, 128, (128, 128, 128)),
        (64, 64, 128, (128, 128, 128)),
        (160, 160, 128, (256, 256, 256)),
        (192, 128, 128, (256, 256, 128)),
        (192, 128, 0, (192, 192, 128)),
        (20, 12, 8, (24, 24, 16)),
    ],
)
def test_results_and_gradients_are_those_of_the_models_width(widths, width, value_width, pad, given, written_out):
    model = Attends(width, value_width, written_out)
    want = results(model, model)
    step = Step("splash_attention", {"pad": pad} if pad else {})
    program = SplashAttention().apply(begin(model, Mode.TRAINING, {}), step)
    got = results(program.call, model)
    assert widths == [given]
    for one, two in zip(want, got, strict=True):
        assert one.shape == two.shape
        assert torch.allclose(one, two, rtol=1e-10, atol=1e-12)


def test_the_scale_of_the_padded_width_would_be_another(widths):
    """What the test above can see: the scale of 128 columns for heads of 80 changes results."""
    model = Attends(80, 80)
    want = results(model, model)[0]
    q, k, v = (functional.pad(t, (0, 48)) for t in _parts(model))
    wrong = functional.scaled_dot_product_attention(q, k, v, is_causal=True)[..., :80]
    assert not torch.allclose(want, wrong, rtol=1e-3)


def _parts(model):
    x = torch.randn(3, ROWS, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in model.parts]


@pytest.mark.parametrize(
    ("width", "params", "said"),
    [
        (128, {"pad": 128}, "multiples of 128 already"),
        (160, {}, "are not taken"),
        (160, {"pad": 32}, "are not taken|already"),
        (64, {"pad": 0}, "pad must be 1 or more"),
    ],
)
def test_what_does_not_apply_says_why(widths, width, params, said):
    model = Attends(width, width)
    with pytest.raises(CandidateError, match=said):
        SplashAttention().apply(begin(model, Mode.TRAINING, {}), Step("splash_attention", params)).call(
            torch.zeros(1, ROWS, 16, dtype=torch.float64)
        )
    assert widths in ([], [(128, 128, 128)])
