"""Steps that store weights in another way: staleness, hooks, ties, checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kernel_pytorch.catalog import apply_candidate
from kernel_pytorch.core.program import begin, restore, ship
from kernel_pytorch.core.types import Candidate, Mode, Step
from kernel_pytorch.core.workload import Call
from kernel_pytorch.transforms.weights_watch import WeightsWatch

pytestmark = pytest.mark.filterwarnings("ignore:.*register_constant.*")

X = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 16)).eval()


def applied(net: nn.Module, *steps: Step) -> nn.Module:
    return ship(apply_candidate(begin(net, Mode.INFERENCE, {"main": Call((X,))}), Candidate(steps)), None)


@pytest.mark.parametrize("step", [Step("prepack"), Step("int8_eager", {"scales": "channel"})], ids=str)
def test_packed_weights_follow_the_parameters(step: Step) -> None:
    shipped, other = applied(model(0), step), model(1)
    with torch.no_grad():
        first = shipped(X)
        shipped.load_state_dict(other.state_dict())
        assert torch.allclose(shipped(X), other(X), atol=2e-2)
        assert not torch.allclose(first, other(X), atol=2e-2)
        shipped[2].bias.add_(1.0)
        assert torch.allclose(shipped(X), other(X) + 1.0, atol=2e-2)


def test_a_hook_added_later_is_called() -> None:
    shipped, seen = applied(model(), Step("prepack")), []
    shipped[0].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        shipped(X)
    assert seen == [1]


def test_a_copy_of_a_packed_model_is_the_plain_model() -> None:
    shipped = applied(model(), Step("int8_eager", {"scales": "tensor"}))
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(shipped)(X), model()(X))
        assert not torch.equal(shipped(X), model()(X))


def test_scales_by_channel_are_more_accurate_than_by_tensor() -> None:
    net = model()
    with torch.no_grad():
        net[0].weight[0] *= 50  # one large channel takes the range of all
        exact = net(X)
        errors = [
            (applied(copy.deepcopy(net), Step("int8_eager", {"scales": s}))(X) - exact).norm() / exact.norm()
            for s in ("channel", "tensor")
        ]
    assert errors[0] < errors[1]


def test_a_quantised_model_loads_the_original_checkpoint() -> None:
    pytest.importorskip("torchao")
    shipped, other = applied(model(0), Step("quantize_int8_weight_only")), model(1)
    with torch.no_grad():
        shipped.load_state_dict(other.state_dict())
        assert torch.allclose(shipped(X), other(X), atol=2e-2)
        quantised = copy.deepcopy(shipped.state_dict())
        shipped.load_state_dict(quantised)
        assert torch.allclose(shipped(X), other(X), atol=2e-2)
    restore(shipped)
    assert type(shipped[0].weight) is nn.Parameter


def test_a_refused_quantisation_leaves_the_model_as_it_was() -> None:
    pytest.importorskip("torchao")
    from kernel_pytorch.errors import CandidateError

    net = model()
    weight = net[0].weight
    with pytest.raises(CandidateError, match="torchao cannot apply"):
        applied(net, Step("quantize_float8_dynamic"))
    assert net[0].weight is weight


def test_a_tied_weight_stays_tied_and_is_told() -> None:
    pytest.importorskip("torchao")
    net = model()
    net.append(nn.Linear(16, 16))
    net.append(nn.Linear(16, 16))
    net[4].weight = net[3].weight
    program = apply_candidate(
        begin(net, Mode.INFERENCE, {"main": Call((X,))}), Candidate((Step("quantize_int8_weight_only"),))
    )
    assert net[3].weight is net[4].weight
    assert type(net[0].weight) is not nn.Parameter
    assert "2 of 4 linear layers" in program.notes[0]


@pytest.mark.parametrize("change", ["load", "assign", "in_place", "data", "buffer"])
def test_every_way_to_change_weights_is_noticed(change: str) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    watch = WeightsWatch(net)
    assert not watch.changed()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    if change in ("load", "assign"):
        net.load_state_dict(state, assign=change == "assign")
    elif change == "in_place":
        with torch.no_grad():
            net[0].bias.zero_()
    elif change == "data":
        net[0].weight.data = torch.zeros(2, 2)
    else:
        net[1].running_mean = torch.ones(2)
    assert watch.changed()
    watch.look()
    assert not watch.changed()


def test_a_buffer_the_model_moves_itself_is_left_out() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    watch = WeightsWatch(net)
    net(torch.randn(4, 2))
    watch.forget_moving()
    net(torch.randn(4, 2))
    assert not watch.changed()
    with torch.no_grad():
        net[0].weight.zero_()
    assert watch.changed()
