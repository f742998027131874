"""Where a step's arguments lie on a slice, and marks turned into annotations."""

import torch

from kernel_pytorch.backends.tpu.sharding import argument_shardings, spread_marks
from kernel_pytorch.backends.tpu.steps import Argument, Role

ARGUMENTS = [
    Argument("w", Role.PARAMETER, (100, 512), torch.float32),
    Argument("w.exp_avg", Role.OPTIMIZER, (512, 100), torch.float32),
    Argument("odd", Role.PARAMETER, (333, 333), torch.float32),
    Argument("norm", Role.PARAMETER, (512,), torch.float32),
    Argument("batch.0", Role.BATCH, (32, 7), torch.int64),
    Argument("batch.1", Role.BATCH, (3,), torch.int64),
]


def test_state_is_spread_along_what_the_devices_divide_and_small_or_odd_tensors_stay_whole():
    assert argument_shardings(ARGUMENTS, 16, "sharded") == [
        "{devices=[1,16]<=[16]}", "{devices=[16,1]<=[16]}", "{replicated}", "{replicated}",
        "{devices=[16,1]<=[16]}", "{replicated}",
    ]  # fmt: skip


def test_data_parallel_spreads_the_batch_alone():
    spread = argument_shardings(ARGUMENTS, 16, "replicated")
    assert [s for s in spread if s != "{replicated}"] == ["{devices=[16,1]<=[16]}"]


PROGRAM = b"""
%1 = stablehlo.optimization_barrier %0 : tensor<32x7xbf16> loc(#a)
%2:2 = stablehlo.optimization_barrier %0, %1 : tensor<32x7xbf16>, tensor<32x7xbf16> loc(#b)
%3 = stablehlo.optimization_barrier %4 : tensor<30x7xf32> loc(#c)
"""


def test_a_barrier_of_one_tensor_becomes_an_annotation_where_its_rows_divide_evenly():
    text = spread_marks(PROGRAM, 16).decode()
    assert (
        '%1 = stablehlo.custom_call @Sharding(%0) {mhlo.sharding = "{devices=[16,1]<=[16]}"} : '
        "(tensor<32x7xbf16>) -> tensor<32x7xbf16> loc(#a)"
    ) in text
    assert text.count("custom_call") == 1
    assert text.splitlines()[2:] == PROGRAM.decode().splitlines()[2:]
