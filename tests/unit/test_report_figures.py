from __future__ import annotations

import math

import pytest

from kernel_pytorch.core.types import Ratio
from kernel_pytorch.report import figures


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (258.04, "258"),
        (92.13, "92.1"),
        (2.84, "2.84"),
        (0.0512, "0.0512"),
        (1234.0, "1,230"),
        (math.inf, "inf"),
    ],
)
def test_number_keeps_three_significant_digits(value, text):
    assert figures.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.08e-2, "1.1e-2"), (2e-2, "2.0e-2"), (3.14e-16, "3.1e-16"), (math.inf, "inf"), (math.nan, "nan")],
)
def test_error(value, text):
    assert figures.error(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "500 us"), (92.13, "92.1 ms"), (1500.0, "1,500 ms"), (12_300.0, "12.3 s"), (0.0, "0 ms")]
)
def test_milliseconds_choose_the_unit(value, text):
    assert figures.milliseconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.05, "50.0 ms"), (22.4, "22.4 s"), (214.0, "3 min 34 s"), (119.9, "2 min 00 s"), (7260.0, "2 h 01 min")],
)
def test_seconds_choose_the_unit(value, text):
    assert figures.seconds(value) == text


def test_sizes_and_counts():
    assert figures.size(98 << 20) == "98.0 MiB"
    assert figures.size(12) == "12 B"
    assert figures.count(22_713_216) == "22.7 M"
    assert figures.rate(8.4e11, "FLOP") == "840 GFLOP/s"
    assert figures.count(3.0, "FLOP") == "3.00 FLOP"


def test_speedups_with_their_interval():
    assert figures.interval(Ratio(2.84, 2.79, 2.9)) == "2.84x [2.79, 2.90]"
    assert figures.interval(Ratio(12.34, 12.1, 12.6)) == "12.3x [12.1, 12.6]"
    assert figures.interval(Ratio(1.57, 0.001, 15_300.0)) == "1.57x [< 0.01, > 1000]"
    assert figures.times(math.inf) == "> 1000x"
    assert figures.times(0.0009) == "< 0.01x"


def test_shares():
    assert figures.percent(0.71) == "71 %"
    assert figures.percent(0.013) == "1.3 %"
    assert figures.percent(0.0) == "0 %"
    assert figures.percent(0.0001) == "< 0.1 %"
