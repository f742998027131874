"""Training steps compiled for TPUs that are not here, by the real compiler: memory, names, refusals, kernels."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import nn

from kernel_pytorch import Workload
from kernel_pytorch.advanced_memory.barrier import hold_apart
from kernel_pytorch.backends.tpu.ahead import Lowered, compile_lowered, lower_program
from kernel_pytorch.backends.tpu.lowering import LoweringError
from kernel_pytorch.backends.tpu.packages import Use, blocking
from kernel_pytorch.backends.tpu.steps import Role
from kernel_pytorch.backends.tpu.topology import parse_topology
from kernel_pytorch.core.types import Candidate, Mode, Step
from kernel_pytorch.errors import KptError
from kernel_pytorch.fit.build import Build
from kernel_pytorch.fit.patterns import search_patterns
from kernel_pytorch.fit.tpu import fit_tpu, outcome

_MISSING = [name for name in ("torch_tpu", "libtpu", "jax") if importlib.util.find_spec(name) is None]
_SKIP = blocking(Use.AHEAD_OF_TIME)
pytestmark = [
    pytest.mark.skipif(bool(_MISSING), reason=f"not installed: {', '.join(_MISSING)}; make test-tpu installs them"),
    pytest.mark.skipif(_SKIP is not None, reason=_SKIP.reason if _SKIP is not None else ""),
]

WIDTH, HIDDEN, ROWS = 512, 4096, 32768


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.sin(self.up(x)))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(128, 3 * 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, 128)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class Layer(nn.Module):
    """A layer with attention, written so that its heads take a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.attends, self.net = Attends(), Net()
        self.into, self.out = nn.Linear(WIDTH, 128, bias=False), nn.Linear(128, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.net(x) + self.out(self.attends(self.into(x)).squeeze(1))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class HoldsViews(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(128, 3 * 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        views = self.qkv(x).unflatten(-1, (3, 1, 128)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = hold_apart([view[..., :64, :] for view in views])
        return q + k + v


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(8, 8), nn.GRU(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gru(self.lstm(x)[0])[0]


class Decomposes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(self.scale(x)).abs()


def mean_square(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).float().square().mean()


def build(model: type[nn.Module], *shape: int, batch: int | None = None, mode: Mode = Mode.TRAINING) -> Build:
    return Build(Workload(model=model, inputs=lambda: torch.zeros(*shape), loss=mean_square), mode, batch=batch)


@pytest.fixture(scope="module")
def lowered() -> Lowered:
    return lower_program(build(Net, ROWS, WIDTH))


def test_the_peak_is_that_of_the_buffer_assignment_and_buffers_have_names(lowered: Lowered) -> None:
    compiled = compile_lowered(lowered, parse_topology("v5e:1"))
    assert compiled.fits
    assert compiled.peak_bytes == pytest.approx(compiled.assigned_bytes, rel=0.02)
    assert sum(b.bytes for b in compiled.buffers) == pytest.approx(compiled.peak_bytes, rel=0.02)
    state = sum(a.bytes for a in lowered.arguments if a.donated)
    assert state == 3 * 2 * 4 * WIDTH * HIDDEN + 2 * 4
    assert compiled.alias_bytes >= state  # what is replaced takes no new memory
    largest = max((b for b in compiled.buffers if b.kind == "temporary"), key=lambda b: b.bytes)
    assert largest.bytes >= 2 * ROWS * HIDDEN
    assert largest.module.split()[0] in ("up", "Net", "down")
    assert {b.name for b in compiled.buffers if b.kind == "argument"} >= {"up.weight", "down.weight.exp_avg"}


def test_operations_are_those_of_the_step(lowered: Lowered) -> None:
    product = 2 * ROWS * WIDTH * HIDDEN
    assert lowered.flops == 5 * product  # two forward, each weight's gradient, and one input's
    found = outcome(
        lowered,
        compile_lowered(lowered, parse_topology("v5p:1"), dump=False),
        parse_topology("v5p:1"),
        mode=Mode.TRAINING,
    )
    assert found.prediction is not None
    assert found.prediction.compute_s == pytest.approx(5 * product / 459e12)
    assert "unverified" in found.prediction.label
    assert not found.verified


def test_what_does_not_fit_is_told_in_the_compilers_words() -> None:
    found = fit_tpu(build(Net, 16, WIDTH, batch=1 << 21), parse_topology("v5e:1"))
    assert found.fits is False
    assert "Ran out of memory" in found.message
    assert found.needed_bytes > found.capacity_bytes > 15 << 30


def test_attention_is_a_mosaic_kernel_that_compiles() -> None:
    lowered = lower_program(build(Attends, 2, 1024, 128))
    assert b"tpu_custom_call" in lowered.stablehlo
    assert compile_lowered(lowered, parse_topology("v5e:1"), dump=False).fits


def test_a_barrier_of_views_copies_nothing_that_they_are_views_of() -> None:
    lowered = lower_program(build(HoldsViews, 2, 256, 128, mode=Mode.INFERENCE))
    assert lowered.stablehlo.count(b"stablehlo.optimization_barrier") == 1
    assert b"stablehlo.pad" not in lowered.stablehlo


def test_recurrent_weights_are_trained() -> None:
    lowered = lower_program(build(Remembers, 4, 2, 8))
    donated = {a.name for a in lowered.arguments if a.donated and a.role is Role.PARAMETER}
    assert donated == {name for name, _ in Remembers().named_parameters()}


def test_an_operator_without_a_lowering_is_named_with_its_module() -> None:
    with pytest.raises((LoweringError, KptError), match=r"linalg_eig"):
        lower_program(build(Decomposes, 8, 8, mode=Mode.INFERENCE))


def test_layers_in_a_loop_are_compiled_once_and_hold_less() -> None:
    plain = build(Layers, 8, 1024, WIDTH)
    params = {"block": "Layer", "keep": "", "plain": 0}
    found = []
    for name in ("", "recompute", "scan_layers"):
        steps = (Step("splash_attention"), *((Step(name, params),) if name else ()))
        found.append(lower_program(replace(plain, candidate=Candidate(steps))))
    whole, again, loop = found
    largest, compiled = (compile_lowered(lowered, parse_topology("v5e:1")) for lowered in (whole, loop))
    assert loop.stablehlo.count(b"stablehlo.while") == 2
    assert loop.stablehlo.count(b"@tpu_custom_call") < again.stablehlo.count(b"@tpu_custom_call") / 3
    assert {a.name for a in loop.arguments} == {a.name for a in whole.arguments}
    assert whole.flops < loop.flops == pytest.approx(again.flops, rel=0.05)
    assert compiled.flops < largest.flops / 2, "the compiler counts the body of a loop once"
    assert compiled.peak_bytes < 0.6 * largest.peak_bytes


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Net() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Chain(Deep):
    """The same without what lies between its layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_search_compiles_the_set_it_found_best_as_a_loop_and_says_why_where_it_cannot() -> None:
    found = search_patterns(build(Chain, 4096, WIDTH), parse_topology("v5e:1"), max_extra_flops=0.5)
    names = [tried.candidate.steps[-1].transform for tried in found.tried[1:]]
    assert names == ["recompute", "scan_layers"]
    recomputed, loop = (tried.fit for tried in found.tried[1:])
    assert recomputed is not None
    assert loop is not None
    assert loop.fits
    # Every step of a loop takes the gradient of its input, which nobody asks of the first layer written out.
    assert loop.flops == recomputed.flops + 2 * 4096 * WIDTH * HIDDEN
    found = search_patterns(build(Deep, 4096, WIDTH), parse_topology("v5e:1"), max_extra_flops=0.5)
    assert not any(s.transform == "scan_layers" for tried in found.tried for s in tried.candidate.steps)
    assert (
        "uses what lies between two blocks"
        in next(s for s in found.survey.left_out if s.transform == "scan_layers").reason
    )


def test_a_forward_has_no_state_to_donate() -> None:
    lowered = lower_program(build(Net, 8, WIDTH, mode=Mode.INFERENCE))
    assert {a.role for a in lowered.arguments} == {Role.PARAMETER, Role.BATCH}
    assert not any(a.donated for a in lowered.arguments)
