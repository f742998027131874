"""Runs Mosaic kernels on the CPU, from the text in which TorchTPU hands them to the TPU compiler.

An interpreter of the operations that its attention kernels consist of, one at a time, on torch tensors. Windows are
copied in and out at each step of the grid, in order; scratch memory stays. What a kernel has not written is NaN.
"""

from __future__ import annotations

import base64
import itertools
import operator
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Kernel", "kernels_of"]

_BODY = re.compile(r"@tpu_custom_call\((?P<operands>[^)]*)\).*?\\22body\\22: \\22(?P<body>[A-Za-z0-9+/=]+)\\22")
_OPERATION = re.compile(
    r'(?:(?P<result>%\w+) = )?"stable_mosaic\.(?P<kind>[\w.]+)"\((?P<operands>[^)]*)\)'
    r"(?: (?P<attributes>\{.*\}))? : \(.*?\) -> (?P<type>.*)"
)
_REGION = re.compile(r'"stable_mosaic\.(?P<kind>[\w.]+)"\((?P<operands>[^)]*)\) \(\{')
_SHAPED = re.compile(r"(?:memref|vector)<((?:\d+x)*)(\w+)")
_DTYPES = {
    "f32": torch.float32, "bf16": torch.bfloat16, "i32": torch.int32, "i1": torch.bool, "index": torch.int64,
}  # fmt: skip

Values = dict[str, Any]


@dataclass(slots=True)
class _Operation:
    kind: str
    operands: list[str]
    result: str = ""
    attributes: str = ""
    type: str = ""
    regions: list[list[_Operation]] = field(default_factory=list)
    arguments: list[tuple[str, str]] = field(default_factory=list)


class Kernel:
    """One kernel.

    Args:
        text: The module, in MLIR's generic form.

    Attributes:
        name: Of its main function.
        grid: Steps in each dimension.
        text: As given.
    """

    def __init__(self, text: str) -> None:
        functions, _ = _parse(text.splitlines()[1:-1])
        *helpers, self._main = functions
        self._helpers = {_symbol(function): function for function in helpers}
        self.text = text
        self.name = _symbol(self._main)
        self.grid = _integers(self._main.attributes, "iteration_bounds")
        windows = self._main.attributes.partition("window_params = ")[2]
        self._maps = re.findall(r"transform_indices = (affine_map<.*?>(?=[,}])|@\w+)", windows)

    def __call__(self, inputs: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return what the kernel computes.

        Args:
            inputs: Its operands.
            results: Shapes and dtypes of its results.
        """
        arrays = [*inputs, *(torch.full_like(r, torch.nan) for r in results)]
        assert len(arrays) == len(self._maps), (len(arrays), len(self._maps))
        names = self._main.arguments
        held = {name: _unwritten(kind) for name, kind in names[len(self.grid) + len(arrays) :]}
        for step in itertools.product(*map(range, self.grid)):
            places: Values = {name: i for (name, _), i in zip(names, step, strict=False)}
            windows = []
            for (name, kind), array, mapped in zip(names[len(self.grid) :], arrays, self._maps, strict=False):
                shape = _shaped(kind)[0]
                starts = [i * n for i, n in zip(self._indices(mapped, step), shape, strict=True)]
                where = tuple(slice(start, start + n) for start, n in zip(starts, shape, strict=True))
                held[name] = array[where].clone()
                windows.append((name, array, where))
            _run(self._main.regions[0], {**places, **held})
            for name, array, where in windows[len(inputs) :]:
                array[where] = held[name]
        return arrays[len(inputs) :]

    def _indices(self, mapped: str, step: Sequence[int]) -> list[int]:
        if mapped.startswith("@"):
            helper = self._helpers[mapped[1:]]
            values: Values = {name: i for (name, _), i in zip(helper.arguments, step, strict=True)}
            return [int(i) for i in _run(helper.regions[0], values)]
        given = mapped.partition("-> (")[2].partition(")")[0].split(", ")
        return [step[int(one[1:])] if one.startswith("d") else int(one) for one in given]


def kernels_of(stablehlo: bytes) -> Iterator[tuple[Kernel, list[str]]]:
    """Yield the kernels of a program and the names of their operands, in its order."""
    for match in _BODY.finditer(stablehlo.decode()):
        yield Kernel(base64.b64decode(match["body"]).decode()), match["operands"].split(", ")


def _parse(lines: Sequence[str], at: int = 0) -> tuple[list[_Operation], int]:
    """Return the operations up to the end of a region, and the line that ends it."""
    found: list[_Operation] = []
    while at < len(lines):
        line = lines[at].strip()
        if line.startswith("}"):
            return found, at
        if match := _REGION.match(line):
            one = _Operation(match["kind"], _names(match["operands"]))
            while lines[at].strip().endswith("{"):
                at += 1
                if lines[at].strip().startswith("^bb0"):
                    one.arguments = re.findall(r"(%\w+): ((?:memref<.*?>>)|\w+)", lines[at])
                    at += 1
                region, at = _parse(lines, at)
                one.regions.append(region)
            one.attributes = lines[at].strip()
        else:
            match = _OPERATION.match(line)
            assert match is not None, line
            one = _Operation(
                match["kind"],
                _names(match["operands"]),
                match["result"] or "",
                match["attributes"] or "",
                match["type"],
            )
        found.append(one)
        at += 1
    return found, at


def _names(operands: str) -> list[str]:
    return operands.split(", ") if operands else []


def _symbol(function: _Operation) -> str:
    match = re.search(r'sym_name = "(\w+)"', function.attributes)
    assert match is not None
    return match[1]


def _shaped(kind: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Return shape and dtype of a memory or a vector."""
    match = _SHAPED.match(kind)
    assert match is not None, kind
    return tuple(int(n) for n in match[1].split("x") if n), _DTYPES[match[2]]


def _unwritten(kind: str) -> torch.Tensor:
    shape, dtype = _shaped(kind)
    return torch.full(shape, torch.nan, dtype=dtype)


def _integers(attributes: str, name: str) -> tuple[int, ...]:
    match = re.search(rf"{name} = (?:array<i64: |array<i32: |\[)([-\d, ]*)[>\]]", attributes)
    assert match is not None, (name, attributes)
    return tuple(int(n) for n in match[1].split(", "))


def _run(region: Sequence[_Operation], values: Values) -> list[Any]:
    """Run a region and return what it ends with; inner regions see the values of outer ones."""
    own = dict(values)
    for one in region:
        given = [own[name] for name in one.operands]
        if one.kind in ("func.return", "scf.yield"):
            return given
        if one.kind == "scf.if":
            _run(one.regions[0 if given[0] else 1], own)
        elif one.kind == "vector.store":
            given[1][_place(given[2:], given[0].shape)] = given[0]
        else:
            own[one.result] = _COMPUTED[one.kind](one, *given)
    return []


def _place(starts: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + n) for start, n in zip(starts, shape, strict=True))


def _constant(one: _Operation) -> Any:
    match = re.search(r"value = (?:dense<([^>]*)>|(\S+))", one.attributes)
    assert match is not None, one.attributes
    text = match[1] or match[2]
    number = struct.unpack(">f", bytes.fromhex(text[2:]))[0] if text.startswith("0x") and len(text) == 10 else None
    if text == "0xFF80":
        number = float("-inf")
    value = {"true": True, "false": False}.get(text) if number is None else number
    if value is None:
        value = float(text) if re.search(r"[.e]", text) else int(text)
    if match[1] is None:
        return value
    shape, dtype = _shaped(one.type)
    return torch.full(shape, value, dtype=dtype)


def _matmul(one: _Operation, left: torch.Tensor, right: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    match = re.search(r"dot_dimension_numbers<\[(\d)\], \[(\d)\]", one.attributes)
    assert match is not None, one.attributes
    assert "transpose_lhs = false" in one.attributes
    assert "transpose_rhs = false" in one.attributes
    return start + torch.tensordot(left.to(start.dtype), right.to(start.dtype), ([int(match[1])], [int(match[2])]))


def _reduced(one: _Operation, value: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    dims = _integers(one.attributes, "reduction_dims")
    if "maximumf" in one.attributes:
        return torch.maximum(value.amax(dims), start)
    assert "kind<add>" in one.attributes, one.attributes
    return value.sum(dims) + start


def _compared(orders: Mapping[int, Callable[[Any, Any], Any]]) -> Callable[..., Any]:
    def compared(one: _Operation, left: Any, right: Any) -> Any:
        match = re.search(r"predicate = (\d+)", one.attributes)
        assert match is not None
        return orders[int(match[1])](left, right)

    return compared


def _slice(one: _Operation, value: torch.Tensor) -> torch.Tensor:
    assert set(_integers(one.attributes, "strides")) == {1}
    return value[_place(_integers(one.attributes, "offsets"), _integers(one.attributes, "sizes"))]


def _iota(one: _Operation) -> torch.Tensor:
    shape, dtype = _shaped(one.type)
    (dim,) = _integers(one.attributes, "dimensions")
    along = [n if i == dim else 1 for i, n in enumerate(shape)]
    return torch.arange(shape[dim], dtype=dtype).view(along).expand(shape)


def _cast(one: _Operation, value: Any) -> Any:
    return value.to(_shaped(one.type)[1])


def _select(one: _Operation, which: Any, left: Any, right: Any) -> Any:
    del one
    return torch.where(which, left, right) if isinstance(which, torch.Tensor) else left if which else right


def _two(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda one, left, right: function(left, right)


_COMPUTED: dict[str, Callable[..., Any]] = {
    "arith.constant": _constant,
    "arith.addi": _two(operator.add),
    "arith.subi": _two(operator.sub),
    "arith.muli": _two(operator.mul),
    "arith.divsi": _two(lambda a, b: int(a / b)),
    "arith.andi": _two(operator.and_),
    "arith.addf": _two(operator.add),
    "arith.subf": _two(operator.sub),
    "arith.mulf": _two(operator.mul),
    "arith.maximumf": _two(torch.maximum),
    "arith.cmpi": _compared(
        dict(enumerate([operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]))
    ),
    "arith.cmpf": _compared({1: operator.eq}),
    "arith.select": _select,
    "arith.extf": _cast,
    "arith.truncf": _cast,
    "math.exp2": lambda one, value: torch.exp2(value),
    "math.log2": lambda one, value: torch.log2(value),
    "tpu.reciprocal": lambda one, value: value.reciprocal(),
    "tpu.iota": _iota,
    "tpu.matmul": _matmul,
    "tpu.concatenate": lambda one, *given: torch.cat(given, _one_integer(one, "dimension")),
    "vector.load": lambda one, memory, *starts: memory[_place(starts, _shaped(one.type)[0])].clone(),
    "vector.shape_cast": lambda one, value: value.reshape(_shaped(one.type)[0]),
    "vector.broadcast": lambda one, value: torch.as_tensor(value).expand(_shaped(one.type)[0]),
    "vector.transpose": lambda one, value: value.permute(_integers(one.attributes, "permutation")),
    "vector.extract_strided_slice": _slice,
    "vector.multi_reduction": _reduced,
}


def _one_integer(one: _Operation, name: str) -> int:
    match = re.search(rf"{name} = (\d+)", one.attributes)
    assert match is not None
    return int(match[1])
