"""Slices of TPUs by name: what can be asked of the compiler, and how many devices it then compiles for."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from kernel_pytorch.errors import KptError

__all__ = ["GENERATIONS", "Topology", "TopologyError", "parse_topology", "valid_topologies"]

GENERATIONS: dict[str, tuple[str, ...]] = {
    "v2": ("2x2", "4x4", "8x8", "16x16"),
    "v3": ("2x2", "4x4", "4x8", "8x8", "16x16", "32x32"),
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "tpu7x": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
}
"""Slices by generation, each accepted by libtpu 0.0.52; the first is one host of four chips."""

_DEVICES_PER_CHIP = {"v2": 2, "v3": 2, "v4": 2, "tpu7x": 2}
"""Where the compiler counts more than one device a chip (as libtpu 0.0.52 lists them)."""

_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x", "7x": "tpu7x", "ironwood": "tpu7x", "trillium": "v6e"}


class TopologyError(KptError):
    """A topology that does not exist; the message lists those that do."""


@dataclass(frozen=True, slots=True)
class Topology:
    """A slice, or one chip of a host.

    Attributes:
        generation: `v2`, `v3`, `v4`, `v5e`, `v5p`, `v6e` or `tpu7x`.
        shape: Chips along each axis; `(1,)` is one chip of a host.
        devices_per_chip: Devices that the compiler counts on one chip.
    """

    generation: str
    shape: tuple[int, ...]
    devices_per_chip: int = 1

    @property
    def chips(self) -> int:
        """How many chips."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """How many devices the compiler counts on them."""
        return self.chips * self.devices_per_chip

    @property
    def name(self) -> str:
        """As the user writes it: `v5e:4x4`, or `v5e:1` for one chip."""
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def compiler_name(self) -> str:
        """As libtpu takes it: one chip is a device of the smallest host, for older versions refuse `1x1`."""
        return f"{self.generation}:{GENERATIONS[self.generation][0]}" if self.shape == (1,) else self.name


def valid_topologies() -> tuple[str, ...]:
    """Return the names of all slices, generation by generation, each with its single chip first."""
    return tuple(f"{generation}:{shape}" for generation, shapes in GENERATIONS.items() for shape in ("1", *shapes))


def parse_topology(text: str) -> Topology:
    """Return the slice that a name asks for.

    Args:
        text: `GENERATION:SHAPE`, e.g. `v5e:4x4` or `v5p:2x2x1`; `GENERATION:1` (or `GENERATION` alone) is one chip.

    Raises:
        TopologyError: No such slice, with the valid ones.
    """
    given = text.strip().lower()
    head, _, tail = given.partition(":")
    generation = _ALIASES.get(head, head)
    shapes = GENERATIONS.get(generation)
    if shapes is None:
        listed = "; ".join(f"{name}: 1 {' '.join(known)}" for name, known in GENERATIONS.items())
        raise TopologyError(
            f"unknown TPU topology {text!r}: no generation {head!r}; the valid ones are {listed}",
            fix="GENERATION:SHAPE, e.g. v5e:4x4, or v5e:1 for one chip",
        )
    per_chip = _DEVICES_PER_CHIP.get(generation, 1)
    if tail in ("", "1"):
        return Topology(generation, (1,), per_chip)
    if tail not in shapes:
        one = " (one chip is asked for by its number)" if re.fullmatch(r"1(x1)+", tail) else ""
        raise TopologyError(
            f"unknown TPU topology {text!r}{one}; the valid ones of {generation} are "
            + ", ".join(f"{generation}:{shape}" for shape in ("1", *shapes)),
            fix=f"{generation}:1 for one chip, or one of those",
        )
    return Topology(generation, tuple(map(int, tail.split("x"))), per_chip)
