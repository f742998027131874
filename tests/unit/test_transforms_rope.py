"""The rotation of queries and keys is found by what it computes, and replaced where a module calls it."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from kernel_pytorch.core.program import begin, restore, ship
from kernel_pytorch.core.types import Mode, Skip, Step
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms import rope as transform
from kernel_pytorch.transforms.rope import Rope


def rotate_half(x):
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def turn(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def turn_backwards(q, k, cos, sin):
    return turn(q, k, cos, -sin)


class Heads(nn.Module):
    """Calls the rotation as Hugging Face's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x, cos, sin):
        q, k = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k))
        q, k = turn(q, k, cos, sin)
        return q, k


class Backwards(Heads):
    def forward(self, x, cos, sin):
        return turn_backwards(self.q(x), self.k(x), cos, sin)


def program_of(model: nn.Module):
    inputs = torch.randn(2, 5, 16), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    return begin(model, Mode.INFERENCE, {"main": Call(inputs, {})}), inputs


def test_the_kernel_is_called_and_computes_the_same(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(transform, "rope", lambda *a, **k: calls.append(k) or original(*a, **k))
    original = sys.modules["kernel_pytorch.ops.rope.api"].rope
    model = Heads().eval()
    program, inputs = program_of(copy.deepcopy(model))
    program = Rope().apply(program, Step("rope"))
    calls.clear()
    with torch.no_grad():
        got, want = ship(program, None)(*inputs), model(*inputs)
    assert calls == [{"layout": "bhsd"}]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want, strict=True))
    restore(program.model)
    assert "forward" not in vars(program.model)


def test_calls_of_another_form_run_the_models_own_function() -> None:
    own = []
    turned = transform._Turn(lambda *a, **k: own.append(k) or turn(*a, **k))
    q, cos = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 8)
    turned(q, q, cos, cos, unsqueeze_dim=2)
    assert not own
    turned(q.transpose(1, 2), q.transpose(1, 2), cos, cos.clone().requires_grad_())
    turned(q[0], q[0], torch.randn(5, 8)[:, None], torch.randn(5, 8)[:, None], unsqueeze_dim=0)
    assert len(own) == 2


def test_another_function_is_left_alone() -> None:
    program, _ = program_of(Backwards())
    with pytest.raises(CandidateError, match="no module of this model calls a rotation"):
        Rope().apply(program, Step("rope"))


def test_it_compiles_without_a_graph_break() -> None:
    program, inputs = program_of(Heads())
    program = Rope().apply(program, Step("rope"))
    with torch.no_grad():
        want = program.call(*inputs)
        got = torch.compile(program.call, backend="eager", fullgraph=True)(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_real_llama_is_matched() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        vocab_size=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(64, (2, 7))
    want = model(ids).logits
    program = Rope().apply(begin(model, Mode.TRAINING, {"main": Call((ids,), {})}), Step("rope"))
    assert program.notes == ["kernels: 2 x rope"]
    assert torch.allclose(program.call(ids).logits, want, atol=1e-5)


def test_it_needs_a_gpu_and_says_so() -> None:
    from kernel_pytorch.hardware import detect

    assert isinstance(Rope().probe(detect("cpu")), Skip)
