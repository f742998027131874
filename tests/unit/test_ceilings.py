"""Upper bounds from the roofline: a model that computes in 16 bits is held against the rate of 16 bits."""

from __future__ import annotations

import pytest
from plans import device

from kernel_pytorch.core.types import OperatorShare, Prediction
from kernel_pytorch.transforms.ceilings import roofline

GPU = device(peak_flops={"float32": 1e12, "bfloat16": 10e12})


def remaining(flops: float) -> float:
    share = OperatorShare("matmul", 0.5, 1, flops, 0.0)
    return roofline(share, Prediction(2000.0, 1.0, flops, 0.0, (share,), {}), GPU, "float32")


def test_a_slow_product_may_reach_the_peak_of_its_format():
    assert remaining(0.25e12) == pytest.approx(0.25)


def test_what_is_faster_than_fp32_can_be_is_held_against_16_bits():
    assert remaining(4e12) == pytest.approx(0.4)
    assert remaining(20e12) == 1.0
