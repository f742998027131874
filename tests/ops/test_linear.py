"""Products by measured algorithms: the operators' gradients, the choice among fakes, and what is left to PyTorch."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernel_pytorch.core.program import begin, restore, ship
from kernel_pytorch.core.types import Mode, Skip, Step
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.measure.choices import load_choices, store_choices
from kernel_pytorch.ops.linear import choice, linear, unsupported
from kernel_pytorch.ops.linear.op import linear_op, product_op
from kernel_pytorch.ops.linear.shapes import AWKWARD
from kernel_pytorch.transforms.linear_algorithm import LinearAlgorithm

STEP = Step("linear_algorithm", {"choice": "measured"})


@pytest.mark.parametrize("shape", AWKWARD)
@pytest.mark.parametrize("bias", [False, True])
def test_the_operator_is_a_linear_layer_with_its_gradients(shape, bias) -> None:
    tokens, inside, outside = shape
    torch.manual_seed(0)
    leaves = [torch.randn(s, dtype=torch.float64) for s in ((tokens, inside), (outside, inside), (outside,))]
    given = [t.requires_grad_() for t in leaves[: 2 + bias]]
    got = linear_op(*given, *([] if bias else [None]))
    want = nn.functional.linear(*given)
    dy = torch.randn_like(want)
    assert torch.allclose(got, want)
    for a, b in zip(torch.autograd.grad(got, given, dy), torch.autograd.grad(want, given, dy), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_gradients_of_the_weight_alone() -> None:
    x, weight = torch.randn(4, 8), torch.randn(6, 8, requires_grad=True)
    (dw,) = torch.autograd.grad(linear_op(x, weight, None).sum(), [weight])
    assert torch.allclose(dw, x.sum(0).expand(6, 8), atol=1e-6)


def test_operators_are_registered_as_pytorch_wants() -> None:
    x, weight, bias = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True), torch.randn(6)
    torch.library.opcheck(torch.ops.kernel_pytorch.linear.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.kernel_pytorch.product.default, (x.detach(), weight.detach(), None, False, True))
    assert torch.allclose(product_op(x, x, None, True, False), x.t() @ x)


def test_elsewhere_it_is_pytorchs_own() -> None:
    x, layer = torch.randn(2, 3, 8), nn.Linear(8, 4)
    assert "NVIDIA" in unsupported(x, layer.weight).reason
    assert torch.equal(linear(x, layer.weight, layer.bias), layer(x))


class FakeProduct:
    """Algorithms that are slow, wrong, refused or fast."""

    device = 0

    def __init__(self, speeds: dict[bytes, float]) -> None:
        self.algorithms = list(speeds)
        self.speeds = speeds

    def compute(self, algorithm, a, b, out, bias=None, scales=None) -> None:
        name = bytes(algorithm)[:1]
        if name == b"r":
            raise choice.cublaslt.CublasLtError("refused")
        out.copy_(a @ b + (name == b"w"))


@pytest.fixture
def on_the_cpu(monkeypatch):
    from kernel_pytorch.backends import manager_for

    real = manager_for("cpu")
    monkeypatch.setattr(choice, "manager_for", lambda _: real)


@pytest.mark.parametrize(
    ("speeds", "winner"),
    [
        ({"a": 1.0, "b": 0.9}, b"b"),
        ({"a": 1.0, "b": 0.995}, b""),  # within 1 %: PyTorch's stays
        ({"a": 1.0, "w": 0.5, "b": 0.9}, b"b"),  # fast and wrong
        ({"r": 0.5, "b": 0.9}, b"b"),  # refused
        ({"w": 0.5}, b""),
        ({"r": 0.5}, b""),
    ],
)
def test_the_fastest_right_algorithm_is_chosen(monkeypatch, on_the_cpu, speeds, winner) -> None:
    named = {name.encode().ljust(64, b"."): ms for name, ms in speeds.items()}

    class Clock:
        def __init__(self, typical) -> None:
            pass

        def in_turns(self, runs, rounds):
            return {n: named[bytes.fromhex(n)] if n else 1.0 for n in runs}

    monkeypatch.setattr(choice, "Bursts", Clock)
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    entry = choice._measure(FakeProduct(named), lambda: a @ b, a, b, None)
    assert bytes.fromhex(entry["algorithm"])[:1] == winner


def test_choices_are_kept_and_merged(tmp_path) -> None:
    path = tmp_path / "linear" / "x.json"
    assert load_choices(path) == {}
    store_choices(path, {"b": {"ms": 1.0}}, {"torch": "2"})
    store_choices(path, {"a": {"ms": 2.0}}, {"torch": "2"})
    assert load_choices(path) == {"a": {"ms": 2.0}, "b": {"ms": 1.0}}
    path.write_text("{")
    assert load_choices(path) == {}
    path.write_text('{"version": 0, "choices": {"a": 1}}')
    assert load_choices(path) == {}


def test_the_transform_swaps_plain_16_bit_layers_and_gives_them_back() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), Own(8, 8), nn.Linear(8, 4)).bfloat16().eval()
    x = torch.randn(3, 8).bfloat16()
    with torch.no_grad():
        want = model(x)
        program = LinearAlgorithm().apply(begin(model, Mode.INFERENCE, {"main": Call((x,), {})}), STEP)
        assert [("forward" in vars(m)) for m in model] == [True, False, True]
        assert program.notes == ["measured products: 2 x nn.Linear"]
        ship(program, None)
        assert torch.equal(model(x), want)
        assert torch.equal(pickle.loads(pickle.dumps(model[0]))(x), model[0](x))
        assert torch.equal(torch.compile(program.call, backend="eager", fullgraph=True)(x), want)
    restore(model)
    assert not any("forward" in vars(m) for m in model)


def test_float64_models_are_left_alone_and_others_refused() -> None:
    program = begin(nn.Sequential(nn.Linear(8, 4)).double(), Mode.INFERENCE, {})
    assert LinearAlgorithm().apply(program, STEP).notes == []
    with pytest.raises(CandidateError, match="has no plain"):
        LinearAlgorithm().apply(begin(nn.ReLU(), Mode.INFERENCE, {}), STEP)
    with pytest.raises(CandidateError, match="must be measured"):
        LinearAlgorithm().apply(program, Step("linear_algorithm"))


def test_it_needs_an_nvidia_gpu_and_says_so() -> None:
    from kernel_pytorch.hardware import detect

    assert isinstance(LinearAlgorithm().probe(detect("cpu")), Skip)


def test_layers_in_float8_have_their_products_measured_too() -> None:
    from kernel_pytorch.precision.linear import swap_linear
    from kernel_pytorch.precision.site import site_of

    model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)).bfloat16()
    site = swap_linear(model[0], "tensorwise_current")
    x = torch.randn(16, 16).bfloat16()
    want = model(x)
    program = LinearAlgorithm().apply(begin(model, Mode.TRAINING, {"main": Call((x,), {})}), STEP)
    assert program.notes == ["measured products in FP8: 1 layers", "measured products: 1 x nn.Linear"]
    assert site_of(model[0]).measured
    asked = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.kernel_pytorch.float8_matmul.default:
                asked.append(args[7])
            return func(*args, **(kwargs or {}))

    with Noted():
        y = model(x)
        y.float().sum().backward()
    assert torch.equal(y, want)
    assert asked == [True, True]  # result and weight's gradient: the input needs none
    for undo in reversed(program.undo):
        undo()
    assert not site.measured
    swap_linear(model[0], "rowwise")
    LinearAlgorithm().apply(begin(model, Mode.TRAINING, {"main": Call((x,), {})}), STEP)
    assert not site_of(model[0]).measured  # scales by row are PyTorch's kernel's
