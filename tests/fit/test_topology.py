"""Names of TPU slices: what is one, and what an unknown one is answered with."""

from __future__ import annotations

import pytest

from kernel_pytorch.backends.tpu.topology import TopologyError, parse_topology, valid_topologies
from kernel_pytorch.hardware.tpu.specs import CHIPS


@pytest.mark.parametrize("name", valid_topologies())
def test_valid_names_come_back(name: str) -> None:
    topology = parse_topology(name)
    assert topology.name == name
    assert topology.devices == topology.chips * topology.devices_per_chip
    assert topology.generation in CHIPS


def test_one_chip_is_a_device_of_the_smallest_host() -> None:
    one = parse_topology("v5e:1")
    assert (one.chips, one.devices, one.compiler_name) == (1, 1, "v5e:2x2")
    assert parse_topology("v5e") == one
    assert parse_topology("V5P:2x2x1").devices == 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v5e:3x3", "v5e:1, v5e:2x2, v5e:2x4"),
        ("v5e:1x1", "one chip is asked for by its number"),
        ("v9:2x2", "v6e: 1 2x2"),
        ("", "no generation"),
        ("v5p:4x4", "v5p:4x4x4"),
    ],
)
def test_an_unknown_one_lists_the_valid_ones(text: str, says: str) -> None:
    with pytest.raises(TopologyError, match="topology") as caught:
        parse_topology(text)
    assert says in str(caught.value)
    assert "for one chip" in caught.value.fix
