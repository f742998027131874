"""The buffers of a compiled program, from the compiler's own dump: what lies in HBM when most of it is held.

The TPU compiler writes its buffer assignment, live ranges and scheduled program as text where `xla_dump_to` says. A
buffer is there as long as any of its values is; values that share a place in the heap are one buffer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Assignment", "Buffer", "read_assignment", "read_program", "read_refusal"]


@dataclass(frozen=True, slots=True)
class Buffer:
    """One allocation of the compiled program.

    Attributes:
        name: The instruction that made it, or the argument's name.
        bytes: With the padding of its layout.
        shape: As the compiler writes it, e.g. `bf16[8,12,1024,1024]`.
        source: `MODULE/NODE` as the lowering named the operation; empty where the compiler kept none.
        kind: `argument`, `temporary` or `output`.
    """

    name: str
    bytes: int
    shape: str = ""
    source: str = ""
    kind: str = "temporary"

    @property
    def module(self) -> str:
        """The module that made it; for an argument its name."""
        return self.name if self.kind == "argument" else self.source.rpartition("/")[0] or self.name


@dataclass(frozen=True, slots=True)
class Assignment:
    """What the compiler assigned in HBM.

    Attributes:
        argument_bytes: Arguments, padding included.
        heap_bytes: The heap of temporaries, as large as it ever is.
        output_bytes: Results that take no argument's place.
        peak: The buffers that are held at the moment when most of the heap is, arguments first, each largest first.
    """

    argument_bytes: int
    heap_bytes: int
    output_bytes: int
    peak: tuple[Buffer, ...] = ()

    @property
    def bytes(self) -> int:
        """HBM that the program needs."""
        return self.argument_bytes + self.heap_bytes + self.output_bytes


@dataclass(slots=True)
class _Value:
    instruction: str
    position: str
    bytes: int
    offset: int
    shape: str


@dataclass(slots=True)
class _Allocation:
    bytes: int
    color: int
    parameter: int | None
    kind: str
    values: list[_Value] = field(default_factory=list)


_ALLOCATION = re.compile(r"^allocation \d+: size (\d+),(.*)$")
_VALUE = re.compile(r"^ value: <\d+ (\S+?)(\{[^}]*\})? @\d+> \(size=(\d+),offset=(\d+)\): (\S+)")
_COLOR = re.compile(r"color (\d+)")
_PARAMETER = re.compile(r"parameter (\d+)")
_RANGE = re.compile(r"^    (\S+?)\{([^}]*)\}:(\d+)-(\d+)$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(\S+) = ")
_OPERATION = re.compile(r'op_name="([^"]*)"')
_OPERAND = re.compile(r"\(%([^\s,)]+)")
_ARGUMENT = re.compile(r"Arg_(\d+)\.")


def read_assignment(directory: Path, names: Sequence[str] = ()) -> Assignment:
    """Return what a dump of one compilation says.

    Args:
        directory: Where the compiler wrote it; holds one module.
        names: Names of the program's arguments, in order.
    """
    allocations = list(_allocations(_one(directory, "after_optimizations-buffer-assignment.txt")))
    hbm = [a for a in allocations if a.color == 0]
    arguments = [a for a in hbm if a.parameter is not None]
    heaps = [a for a in hbm if a.kind == "heap"]
    outputs = [a for a in hbm if a.kind == "output"]
    sources = _sources(_one(directory, "after_optimizations.txt"), names)
    ranges = _ranges(_one(directory, "after_optimizations-live-range.txt"))
    held = [
        Buffer(v.instruction, v.bytes, _shape(v.shape), sources.get(v.instruction, ""))
        for heap in heaps
        for v in _at_peak(heap.values, ranges)
    ]
    given = [
        Buffer(_named(a.parameter, names), a.bytes, _shape(a.values[0].shape) if a.values else "", kind="argument")
        for a in arguments
    ]
    order = [*sorted(given, key=_size, reverse=True), *sorted(held, key=_size, reverse=True)]
    return Assignment(sum(map(_size, arguments)), sum(map(_size, heaps)), sum(map(_size, outputs)), tuple(order))


def read_program(directory: Path) -> str:
    """Return the scheduled program of a dump of one compilation, as text."""
    return _one(directory, "after_optimizations.txt").read_text(encoding="utf-8", errors="replace")


def _size(of: _Allocation | Buffer) -> int:
    return of.bytes


def _one(directory: Path, ending: str) -> Path:
    found = [p for p in directory.iterdir() if p.name.endswith(f".{ending}")]
    assert len(found) == 1, f"{len(found)} files *.{ending} in the compiler's dump"
    return found[0]


def _allocations(path: Path) -> Iterator[_Allocation]:
    current: _Allocation | None = None
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if match := _ALLOCATION.match(line):
                if current is not None:
                    yield current
                current = _allocation(int(match[1]), match[2])
            elif current is not None and (match := _VALUE.match(line)):
                position = (match[2] or "{}")[1:-1]
                current.values.append(_Value(match[1], position, int(match[3]), int(match[4]), match[5]))
            elif current is not None and line.strip() and not line.startswith(" "):
                break  # what follows repeats the values in another order
    if current is not None:
        yield current


def _allocation(size: int, said: str) -> _Allocation:
    color = _COLOR.search(said)
    parameter = _PARAMETER.search(said)
    kind = "heap" if "preallocated-temp" in said else "output" if "output shape" in said else "other"
    return _Allocation(size, int(color[1]) if color else 0, int(parameter[1]) if parameter else None, kind)


def _sources(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the name that the lowering gave, by instruction.

    What the compiler added itself (a copy between memories, say) has that of its first operand; of an argument it is
    `ARGUMENT/copy`.
    """
    sources: dict[str, str] = {}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if (match := _INSTRUCTION.match(line)) is None:
                continue
            operand = _OPERAND.search(line)
            if named := _OPERATION.search(line):
                sources[match[1]] = named[1]
            elif operand and (argument := _ARGUMENT.match(operand[1])):
                sources[match[1]] = f"{_named(int(argument[1]), names)}/copy"
            elif operand and (source := sources.get(operand[1])):
                sources[match[1]] = source
    return sources


def _ranges(path: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """Return the first and last moment of each value, by instruction and position."""
    ranges = {}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if match := _RANGE.match(line):
                ranges[match[1], match[2]] = (int(match[3]), int(match[4]))
    return ranges


def _at_peak(values: Sequence[_Value], ranges: dict[tuple[str, str], tuple[int, int]]) -> list[_Value]:
    """Return one value of each place of the heap that is taken when the most bytes are."""
    events: list[tuple[int, int, _Value]] = []
    for value in values:
        if (live := ranges.get((value.instruction, value.position))) is not None:
            events += [(live[0], 0, value), (live[1] + 1, -1, value)]
    events.sort(key=lambda event: (event[0], event[1]))
    places: dict[int, list[_Value]] = {}
    taken = most = 0
    best: list[_Value] = []
    for position, (moment, ends, value) in enumerate(events):
        there = places.setdefault(value.offset, [])
        taken -= max((v.bytes for v in there), default=0)
        there.remove(value) if ends else there.append(value)
        taken += max((v.bytes for v in there), default=0)
        last = position + 1 == len(events) or events[position + 1][0] != moment
        if last and taken > most:
            most = taken
            best = [max(v, key=lambda x: x.bytes) for v in places.values() if v]
    return best


def _shape(text: str) -> str:
    """Return `bf16[8,1024]` of `bf16[8,1024]{1,0:T(8,128)}`."""
    return text.partition("{")[0].lstrip("(")


def _named(parameter: int | None, names: Sequence[str]) -> str:
    assert parameter is not None
    return names[parameter] if parameter < len(names) else f"argument {parameter}"


_LARGEST = re.compile(r"^\s*\d+\. Size: ([\d.]+)([KMG]?).*?\n(.*?)(?=^\s*\d+\. Size:|\Z)", re.MULTILINE | re.DOTALL)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def read_refusal(message: str) -> tuple[Buffer, ...]:
    """Return the largest allocations that the compiler lists where memory ran out."""
    buffers = []
    for match in _LARGEST.finditer(message):
        size = int(float(match[1]) * _UNITS[match[2]])
        operator = re.search(r'op_name="([^"]*)"', match[3])
        shape = re.search(r"Shape: (\S+)", match[3])
        name = re.search(r"XLA label: %?(\S+)", match[3])
        kind = "argument" if "Allocation type: Entry argument" in match[3] else "temporary"
        buffers.append(
            Buffer(
                name[1] if name else "",
                size,
                _shape(shape[1]) if shape else "",
                operator[1] if operator else "",
                kind,
            )
        )
    return tuple(buffers)
