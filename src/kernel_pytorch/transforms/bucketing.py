"""Pad batch and sequence to buckets, so that code made for a few shapes serves all of them.

Padding costs the work on what is padded and is right only where a row does not see its neighbours, and a token not
those that the mask excludes. Both are checked by running the model when the step is applied: outputs of the real rows
must agree with the unpadded call, and must be the same bit for bit whatever the padding holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from kernel_pytorch.core.program import clone_call, plain_call
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.core.workload import Call
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.cuda_graph import opaque
from kernel_pytorch.transforms.plain_source import plain_source
from kernel_pytorch.transforms.trees import map_tensors

__all__ = ["Bucketing", "bucketed", "pad_to", "round_up"]

_ROUNDING = 64.0
"""Another shape may run another kernel: this many units in the last place are allowed, of the row's largest value."""


def round_up(size: int, buckets: Sequence[int]) -> int:
    """Return the smallest bucket that holds `size`; without buckets, or above them, the next power of two."""
    fits = [bucket for bucket in buckets if bucket >= size]
    return min(fits) if fits else 1 << max(size - 1, 0).bit_length()


def pad_to(tensor: torch.Tensor, dim: int, size: int, *, repeat: bool) -> torch.Tensor:
    """Return a tensor filled up along `dim`, with its first slice again or with zeros."""
    missing = size - tensor.shape[dim]
    if missing <= 0:
        return tensor
    first = tensor.narrow(dim, 0, 1)
    shape = list(tensor.shape)
    shape[dim] = missing
    filling = first.expand(shape) if repeat else torch.zeros_like(first).expand(shape)
    return torch.cat([tensor, filling], dim)


def sizes_in(tensors: Sequence[torch.Tensor], dims: Sequence[str]) -> dict[str, int]:
    """Return the sizes of batch (`b`) and sequence (`s`), which all inputs must agree about."""
    found: dict[str, int] = {}
    for tensor, letters in zip(tensors, dims, strict=True):
        for dim, letter in enumerate(letters):
            if letter in ("b", "s") and found.setdefault(letter, tensor.shape[dim]) != tensor.shape[dim]:
                raise ValueError(f"inputs disagree about the size of dimension {dim}: {tuple(tensor.shape)}")
    return found


def bucketed(inner: Callable[..., Any], dims: Any, cuts: Any, buckets: Sequence[int]) -> Callable[..., Any]:
    """Return `inner` on inputs padded up to buckets, with its outputs cut back.

    Args:
        inner: The call.
        dims: For each tensor of the inputs, in pytree order, the dimensions that are padded: `b` (with the first row
            again), `s` (with zeros) or anything else (not at all), e.g. `["bs", "b", ""]`.
        cuts: For each tensor of the outputs, in the order of `map_tensors`, (dimension, `b` or `s`) of what is cut.
        buckets: Sizes to pad to; none for powers of two.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        if len(places) != len(dims):
            raise ValueError(f"the call has {len(places)} tensors, the one that was bucketed {len(dims)}")
        sizes = sizes_in([leaves[i] for i in places], dims)
        for i, letters in zip(places, dims, strict=True):
            for dim, letter in enumerate(letters):
                if letter in sizes:
                    leaves[i] = pad_to(leaves[i], dim, round_up(sizes[letter], buckets), repeat=letter == "b")
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        todo = iter(cuts)

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            for dim, letter in next(todo):
                tensor = tensor.narrow(dim, 0, sizes[letter])
            return tensor

        return map_tensors(inner(*args, **kwargs), cut)

    return run


class Bucketing:
    """`dims=batch|batch_sequence`, `buckets=8,16,32` (default: powers of two); one batch size, any number of rows.

    The batch is the first dimension of the first tensor, and of every tensor that agrees with it. The sequence is the
    second dimension of `attention_mask`, a keyword argument, and of every tensor that has both; it is padded at its
    end, masked out. The program then accepts every size, by running one of a few.
    """

    name = "bucketing"
    summary = "pad batch and sequence to a few sizes, where padding is shown to have no effect"
    group = "buckets"
    numerics = Numerics.REORDERED
    modes = frozenset({Mode.INFERENCE})
    compiles = False

    def probe(self, device: DeviceSpec) -> Skip | None:  # noqa: ARG002
        """Padding needs nothing."""
        return None

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:  # noqa: ARG002
        """Where the workload has several shapes."""
        if workload.mode is Mode.TRAINING:
            return Skip("padded rows would take part in the loss")
        if len({tuple(s.shape for s in case) for case in workload.signatures.values()}) < 2:
            return Skip("the workload has one shape only", fix="give each shape as a case of the workload")
        return [Step(self.name, {"dims": "batch"}), Step(self.name, {"dims": "batch_sequence"})]

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """Nothing alone: it lets others specialise, and what they gain is bounded there."""
        del step, prediction, device
        return 1.0

    def apply(self, program: Program, step: Step) -> Program:
        """Find the dimensions from the example calls, show that padding has no effect, and wrap the call."""
        if not program.calls:
            raise CandidateError(f"{step} is checked on example inputs", fix="pass them: inputs=(x,)")
        kind = str(step.params.get("dims", "batch"))
        if kind not in ("batch", "batch_sequence"):
            raise CandidateError(f"unknown dims {kind!r}; expected batch or batch_sequence")
        buckets = _buckets(str(step.params.get("buckets", "")))
        calls = list(program.calls.values())
        found = {tuple(_dims(call, sequence=kind != "batch")) for call in calls}
        if len(found) > 1:
            raise CandidateError("the example calls do not agree about which inputs have a batch dimension")
        dims = list(found.pop())
        plain = plain_call(program.model)
        with torch.no_grad():
            cuts = [_check(plain, call, dims) for call in calls]
        if any(c != cuts[0] for c in cuts):
            raise CandidateError("the example calls do not agree about which outputs have a batch dimension")
        program.call = bucketed(program.call, dims, cuts[0], buckets)
        program.dynamic = True
        program.notes.append(f"inputs are padded to {step.params.get('buckets', 'powers of two')}: {' '.join(dims)}")
        return program

    def source(self, step: Step) -> str:
        """The same functions; the dimensions of the example calls have to be filled in."""
        buckets = _buckets(str(step.params.get("buckets", "")))
        then = (
            "# One entry for each tensor of the inputs: 'b' and 's' mark what is padded; and for each tensor of the\n"
            "# outputs: (dimension, letter) of what is cut back.\n"
            f"call = bucketed(call, ['b'], [[(0, 'b')]], {buckets!r})"
        )
        return plain_source(map_tensors, round_up, pad_to, sizes_in, bucketed, then=then)


def _buckets(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() and int(part) for part in parts):
        raise CandidateError(f"buckets are sizes separated by commas, got {text!r}")
    return sorted(int(part) for part in parts)


def _tensors(call: Call) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves((call.args, dict(call.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _dims(call: Call, *, sequence: bool) -> Iterator[str]:
    """Yield for each tensor of the inputs the letters of its dimensions: `b`, `s`, or `.`."""
    tensors = _tensors(call)
    if not tensors or not tensors[0].ndim:
        raise CandidateError("the first input has no batch dimension")
    batch, mask = tensors[0].shape[0], call.kwargs.get("attention_mask")
    if sequence and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
        raise CandidateError("a sequence is padded only with a two-dimensional attention_mask among the inputs")
    length = mask.shape[1] if sequence and isinstance(mask, torch.Tensor) else None
    for tensor in tensors:
        rows = tensor.ndim > 0 and tensor.shape[0] == batch
        tokens = rows and length is not None and tensor.ndim > 1 and tensor.shape[1] == length
        yield ("b" if rows else ".") + ("s" if tokens else "") if tensor.ndim else ""


def _check(plain: Callable[..., Any], call: Call, dims: list[str]) -> list[list[tuple[int, str]]]:
    """Run a call padded in different ways and return what to cut of each output.

    Raises:
        CandidateError: Padding has an effect on what is left of the outputs.
    """
    want = _outputs(plain, call)
    cuts: list[list[tuple[int, str]]] = [[] for _ in want]
    letters = sorted({letter for entry in dims for letter in entry} & {"b", "s"})
    for letter in letters:
        size = next(t.shape[e.index(letter)] for t, e in zip(_tensors(call), dims, strict=True) if letter in e)
        ways = ((3, False), (3, True), (1, False))
        runs = [_outputs(plain, _padded(call, dims, letter, size + extra, other=other)) for extra, other in ways]
        for i, output in enumerate(want):
            shapes = {run[i].shape for run in runs[:2]}
            grown = [d for d in range(output.ndim) if runs[0][i].shape[d] != output.shape[d]]
            if len(shapes) > 1 or any(runs[0][i].shape[d] != size + 3 or output.shape[d] != size for d in grown):
                raise CandidateError(f"padding changes output {i} from {tuple(output.shape)} to {sorted(shapes)}")
            left = [run[i] for run in runs]
            for d in grown:
                left = [tensor.narrow(d, 0, size) for tensor in left]
            _same(left, output, i, "rows" if letter == "b" else "tokens")
            cuts[i] += [(d, letter) for d in grown]
    return cuts


def _same(left: list[torch.Tensor], want: torch.Tensor, index: int, what: str) -> None:
    if not torch.equal(left[0], left[1]):
        raise CandidateError(f"output {index} depends on what padded {what} hold")
    for got in (left[0], left[2]):
        if torch.equal(got, want):
            continue
        if not want.is_floating_point():
            raise CandidateError(f"output {index} changes when {what} are padded")
        apart, allowed = float((got - want).abs().max()), _ROUNDING * torch.finfo(want.dtype).eps
        allowed *= float(want.abs().max())
        if not apart <= allowed:
            raise CandidateError(
                f"output {index} changes by {apart:.2g} when {what} are padded ({allowed:.2g} allowed)"
            )


def _outputs(plain: Callable[..., Any], call: Call) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor.detach().clone())
        return tensor

    call = clone_call(call)
    try:
        out = plain(*call.args, **call.kwargs)
    except RuntimeError as error:
        shapes = [tuple(t.shape) for t in _tensors(call)]
        raise CandidateError(f"inputs padded to {shapes} do not fit the model: {error}") from error
    if opaque(out):
        raise CandidateError(f"the model returns a {opaque(out)}, which cannot be cut back")
    map_tensors(out, note)
    return found


def _padded(call: Call, dims: list[str], letter: str, size: int, *, other: bool) -> Call:
    """Return a call with one kind of dimension padded: as `bucketed` pads it, or with other values."""
    leaves, spec = pytree.tree_flatten((call.args, dict(call.kwargs)))
    mask = call.kwargs.get("attention_mask")
    entries = iter(dims)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor):
            continue
        entry = next(entries)
        if letter in entry:
            dim = entry.index(letter)
            padded = pad_to(leaf, dim, size, repeat=letter == "b")
            if other and not (letter == "s" and leaf is mask):
                padded.narrow(dim, leaf.shape[dim], size - leaf.shape[dim]).copy_(_other(leaf, dim))
            leaves[i] = padded
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return Call(args, kwargs)


def _other(leaf: torch.Tensor, dim: int) -> torch.Tensor:
    """Return a slice of valid values to pad with that differ from the first slice and from zero."""
    if leaf.is_floating_point():
        return 0.25 - 0.5 * leaf.narrow(dim, 0, 1)
    if dim == 0 and leaf.ndim > 1:
        return leaf.narrow(0, leaf.shape[0] - 1, 1).flip(1)
    return leaf.long().amax(dim, keepdim=True).to(leaf.dtype)
