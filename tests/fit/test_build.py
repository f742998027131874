"""Targets as programs to trace: without memory where they can be, with the batch that was asked for."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch import Workload
from kernel_pytorch.core.types import Mode
from kernel_pytorch.core.workload import Call, as_call
from kernel_pytorch.errors import InputsError, KptError, TargetError
from kernel_pytorch.fit.build import Build, batch_size, with_batch_size


def test_every_tensor_of_the_batch_grows_and_no_other() -> None:
    batch = {
        "ids": torch.arange(6).reshape(2, 3),
        "mask": torch.ones(2, 1, 3, 3),
        "scale": torch.tensor(2.0),
        "table": torch.zeros(7, 3),
        "flag": True,
    }
    grown = with_batch_size(batch, 5)
    assert batch_size(batch) == 2
    assert {k: tuple(v.shape) for k, v in grown.items() if isinstance(v, torch.Tensor)} == {
        "ids": (5, 3),
        "mask": (5, 1, 3, 3),
        "scale": (),
        "table": (7, 3),
    }
    assert grown["ids"][4].equal(batch["ids"][0])
    assert grown["flag"] is True


@pytest.mark.parametrize(
    "make", [lambda x: Call((x,), {"scale": x}), lambda x: UserDict({"x": x, "scale": x})], ids=["Call", "UserDict"]
)
def test_a_batch_in_a_container_that_pytree_does_not_know_grows_and_stays_what_it_is(make: Callable[..., Any]) -> None:
    grown = with_batch_size(make(torch.ones(2, 3)), 5)
    assert type(grown) is type(make(torch.ones(2, 3)))
    call = as_call(grown)
    assert [tuple(t.shape) for t in (*call.args, *call.kwargs.values())] == [(5, 3), (5, 3)]


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(InputsError, match="a batch of 0"):
        with_batch_size(torch.ones(2, 3), 0)
    with pytest.raises(InputsError, match="no batch dimension"):
        with_batch_size(torch.tensor(1.0), 4)


def test_a_large_model_is_built_without_memory() -> None:
    workload = Workload(model=lambda: nn.Linear(1 << 17, 1 << 17), inputs=lambda: torch.ones(2, 1 << 17))  # 69 GB
    program, batch = Build(workload, Mode.TRAINING, batch=4)()
    assert program.model.weight.is_meta
    assert program.model.training
    assert tuple(batch.shape) == (4, 1 << 17)


def test_a_model_that_reads_values_is_built_with_them() -> None:
    def model() -> nn.Module:
        rates = [x.item() for x in torch.linspace(0, 0.1, 3)]
        return nn.Sequential(nn.Linear(4, 4), nn.Dropout(rates[-1]))

    program, _ = Build(Workload(model=model, inputs=lambda: torch.ones(2, 4)), Mode.INFERENCE)()
    assert not program.model[0].weight.is_meta
    assert not program.model.training


def test_a_file_of_the_user_is_a_target(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\ndef pair():\n    return torch.nn.Linear(3, 3), torch.ones(5, 3)\n", encoding="utf-8"
    )
    program, batch = Build(f"{tmp_path / 'mine.py'}:pair", Mode.INFERENCE)()
    assert program.model.weight.is_meta
    assert batch.shape == (5, 3)
    with pytest.raises(TargetError, match="no 'pear'"):
        Build(f"{tmp_path / 'mine.py'}:pear", Mode.INFERENCE)()


def test_an_unknown_case_lists_the_known() -> None:
    workload = Workload(model=lambda: nn.Linear(3, 3), inputs=lambda: torch.ones(2, 3))
    with pytest.raises(KptError, match="no case 'long'; the workload has main"):
        Build(workload, Mode.INFERENCE, case="long")()
