"""What casting touches and what it leaves alone."""

from __future__ import annotations

import torch
from torch import nn

from kernel_pytorch.catalog import apply_candidate
from kernel_pytorch.core.program import begin, restore, ship
from kernel_pytorch.core.types import Candidate, Mode, Step
from kernel_pytorch.core.workload import Call

CAST = Candidate((Step("dtype", {"to": "bfloat16", "how": "cast"}),))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.wave = nn.Parameter(torch.ones(4, dtype=torch.complex64))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("shift", torch.ones(4))
        self.register_buffer("inv_freq", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        assert scale.dtype is torch.float64
        y = self.linear(x) + self.shift
        self.seen = y.dtype
        return {"y": y * mask, "scale": scale, "wave": self.wave}


def mixed() -> tuple[Mixed, Call]:
    call = Call((torch.randn(2, 4), torch.ones(2, 4, dtype=torch.bool)), {"scale": torch.ones(1, dtype=torch.float64)})
    return Mixed().eval(), call


def test_only_what_has_the_main_dtype_is_cast() -> None:
    model, call = mixed()
    parameter = model.linear.weight
    program = apply_candidate(begin(model, Mode.INFERENCE, {"main": call}), CAST)
    with torch.no_grad():
        out = program.call(*call.args, **call.kwargs)
    assert model.seen is torch.bfloat16
    assert model.linear.weight is parameter
    assert model.wave.dtype is torch.complex64
    assert model.shift.dtype is torch.bfloat16
    assert model.inv_freq.dtype is torch.float32
    assert {k: v.dtype for k, v in out.items()} == {
        "y": torch.float32,
        "scale": torch.float64,
        "wave": torch.complex64,
    }


def test_values_loaded_since_survive_the_undo() -> None:
    model, call = mixed()
    shipped = ship(apply_candidate(begin(model, Mode.INFERENCE, {"main": call}), CAST), None)
    fresh = mixed()[0].state_dict()
    shipped.load_state_dict(fresh)
    restore(shipped)
    assert shipped.linear.weight.dtype is torch.float32
    assert torch.equal(shipped.linear.weight, fresh["linear.weight"].bfloat16().float())


def test_recurrent_layers_keep_their_flat_weights() -> None:
    model = nn.LSTM(4, 8).eval()
    call = Call((torch.randn(3, 2, 4),))
    with torch.no_grad():
        expected = model(*call.args)
        shipped = ship(apply_candidate(begin(model, Mode.INFERENCE, {"main": call}), CAST), None)
        got = shipped(*call.args)
        assert got[1][0].dtype is torch.float32
        assert torch.allclose(got[0], expected[0], atol=2e-2)
        assert not torch.equal(got[0], expected[0])
        restore(shipped)
        assert torch.equal(shipped(*call.args)[0], expected[0])


def test_autocast_leaves_parameters_and_gives_gradients() -> None:
    model = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    step = Candidate((Step("dtype", {"to": "bfloat16", "how": "autocast"}),))
    program = apply_candidate(begin(model, Mode.TRAINING, {"main": Call((x,))}), step)
    out = program.call(x)
    assert out.dtype is torch.float32
    assert model.weight.dtype is torch.float32
    out.sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.dtype is torch.float32
    assert not torch.equal(out, model._call_impl(x))
