"""Steps that cast to bfloat16 are judged with their casts lifted: a budget of bfloat16 cannot hide what they add."""

from __future__ import annotations

import torch
from tests.faults.faithful import FAITHFUL
from tests.faults.harness import bench_for, catalogue, try_untimed
from torch import nn

from kernel_pytorch.core.types import Candidate, Gate, Mode, Status, Step
from kernel_pytorch.search.trial import TrialRequest
from kernel_pytorch.validation.lift import QuantisationWatch


def judged(step: Step):
    bench = bench_for("mlp", Mode.INFERENCE)
    bench.transforms = catalogue(FAITHFUL)
    return try_untimed(bench, TrialRequest(Candidate((step,))))


def test_one_percent_in_one_element_of_a_bfloat16_layer_is_seen():
    outcome = judged(Step("low_precision_scale", {"size": "element"}))
    assert outcome.status is Status.WRONG
    assert outcome.numerics.worst.gate is Gate.STRUCTURE
    assert 1e-9 < outcome.numerics.worst.error < 2e-2


def test_an_honest_bfloat16_layer_is_exact_once_lifted():
    outcome = judged(Step("low_linear"))
    assert outcome.status is Status.OK
    exact = [c for c in outcome.numerics.checks if c.gate is Gate.STRUCTURE]
    assert exact
    assert all(c.error <= 1e-9 for c in exact)


def test_eight_bit_rounding_cannot_be_lifted_and_is_noted():
    x = torch.randn(4)
    with QuantisationWatch() as watch:  # bytes of a float are not a rounding
        nn.functional.linear(x[None], torch.randn(2, 4))
        x.view(torch.uint8)
        torch.get_rng_state()
    assert not watch.seen
    for rounds in (lambda: x.to(torch.int8), lambda: (x * 8).round() / 8, lambda: x.to(torch.float8_e4m3fn)):
        with QuantisationWatch() as watch:
            rounds()
        assert watch.seen
