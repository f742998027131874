"""Cumulative sums of a newer StableHLO, written as libtpu reads them."""

from __future__ import annotations

from kernel_pytorch.backends.tpu.scans import plain_scans

PROGRAM = """
    %c_12 = stablehlo.constant dense<0> : tensor<4xi64> loc(#loc)
    %3:2 = chlo.scan(%2) inits (%c_12) dimension=1  attributes {is_associative = true, is_reverse = false, \
scan_dim_size = 16 : i64} {
    ^bb0(%input: tensor<4xi64> loc("cumsum"(#loc68)), %carry: tensor<4xi64> loc("cumsum"(#loc68))):
      %242 = stablehlo.add %input, %carry : tensor<4xi64> loc(#loc118)
      stablehlo.return %242, %242 : tensor<4xi64>, tensor<4xi64> loc(#loc118)
    } : (tensor<4x16xi64>, tensor<4xi64>) -> (tensor<4x16xi64>, tensor<4xi64>) loc(#loc118)
    %4 = stablehlo.convert %3#0 : (tensor<4x16xi64>) -> tensor<4x16xi32> loc(#loc121)
"""


def test_a_cumulative_sum_is_a_window_over_what_came_before() -> None:
    text = plain_scans(PROGRAM)
    assert "chlo.scan" not in text
    assert "window_dimensions = array<i64: 1, 16>" in text
    assert "padding = dense<[[0, 0], [15, 0]]> : tensor<2x2xi64>" in text
    assert "stablehlo.convert %3 :" in text


def test_what_is_no_plain_sum_is_left_as_it_is() -> None:
    for change in (("dense<0>", "dense<5>"), ("is_reverse = false", "is_reverse = true"), ("%3#0", "%3#1")):
        other = PROGRAM.replace(*change)
        assert plain_scans(other) == other
