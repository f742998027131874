"""What is known of the unmodified model: its outputs, side effects, fp64 outputs, what casting costs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from kernel_pytorch.core.program import clone_call, clone_model
from kernel_pytorch.core.types import Mode, Step
from kernel_pytorch.core.workload import Call, Workload
from kernel_pytorch.errors import InputsError, ModelError
from kernel_pytorch.validation.compare import Flat, compare_values, flatten, same_bits, tensor_error
from kernel_pytorch.validation.lift import lift_tree, lifted, lifted_model
from kernel_pytorch.validation.subject import Memo, Observed, attempt, observe, run
from kernel_pytorch.validation.vary import batch_size, redrawn, rows_of

__all__ = ["Emulation", "Oracle", "batch_calls", "digest", "identity", "loss_of"]

Emulation = Callable[[nn.Module, Step], nn.Module]
"""Rounds a model's operands as a step does, in place, and returns the model."""
_SEEDS = {"quick": 2, "standard": 2, "strict": 5}
_MIN_CALLS = {"quick": 4, "standard": 5, "strict": 7}
_ROWS = 4
"""Samples of a batch that are computed in fp64; the others are compared with the reference's own outputs."""
_SLICED_FROM = 8
_UNDEFINED = 0.1
"""Two runs on one input that differ by more than this compute nothing."""
_SLICE_ROUNDING = 1e-4
"""What a model may change about a sample for having fewer beside it: other blocking, not other statistics."""
_FIRST_SEED = 1000
"""Added to the configured seed: inputs that judge are not those that calibrated or traced."""


def identity(model: nn.Module) -> str:
    """Return a hash of a model's class, and of its state's names, shapes and dtypes."""
    parts = [type(model).__qualname__]
    parts += [f"{k} {tuple(v.shape)} {v.dtype}" for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def digest(tree: Any) -> str:
    """Return a hash of the values of a tree of inputs."""
    flat = flatten(tree)
    total = hashlib.sha256(repr((flat.kinds, flat.scalars)).encode())
    for value in flat.tensors.values():
        plain = torch.view_as_real(value) if value.is_complex() else value
        total.update(repr((value.shape, value.dtype)).encode())
        total.update(plain.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def loss_of(workload: Workload) -> Callable[[Any, Any], torch.Tensor]:
    """Return `loss(model, batch)`: the workload's, or the one read from the model's output."""
    if workload.loss is not None:
        return workload.loss

    def from_output(model: Any, batch: Any) -> torch.Tensor:
        from kernel_pytorch.core.workload import as_call

        call = as_call(batch)
        out = model(*call.args, **call.kwargs)
        loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", out)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise InputsError("the model returns no scalar loss", fix="give the workload a loss(model, batch)")
        return loss

    return from_output


class _CaptureError(BaseException):
    """Ends a forward once its arguments are known."""


def batch_calls(workload: Workload, reference: nn.Module, mode: Mode, batch: Any) -> Call:
    """Return the arguments the model is called with for a batch: those that the loss function passes on."""
    from kernel_pytorch.core.workload import as_call

    if mode is Mode.INFERENCE or workload.loss is None:
        return as_call(batch)
    caught: list[Call] = []

    class _Probe(nn.Module):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            caught.append(Call(args, kwargs))
            raise _CaptureError

        def __getattr__(self, name: str) -> Any:
            return getattr(reference, name)

    try:
        workload.loss(_Probe(), batch)
    except _CaptureError:
        return clone_call(caught[0])
    raise InputsError("the loss function does not call the model")


class Oracle:
    """The unmodified model, asked as little as possible: answers are kept in the memo.

    Attributes:
        unchecked: What could not be computed, and why.
        exact_dtype: `float64`, or `float32` where the model has operators without fp64.
    """

    def __init__(
        self,
        workload: Workload,
        reference: nn.Module,
        mode: Mode,
        place: Callable[[Any], Any],
        memo: Memo,
        *,
        seed: int = 0,
        level: str = "standard",
    ) -> None:
        self.workload, self.reference, self.mode, self.place, self.memo = workload, reference, mode, place, memo
        self.seed, self.level = seed, level
        self.identity = f"{identity(reference)} {mode} {reference.training}"
        self.unchecked: list[str] = []
        self.exact_dtype = "float64"
        self._calls: dict[str, list[tuple[Call, int]]] = {}
        self._made: dict[tuple[str, int], Call] = {}

    def batch(self, case: str, index: int) -> Any:
        """Return the batch of a case under the judging seed `index`, on the device."""
        return self.place(self.workload.batch(case, self.seed + _FIRST_SEED + index))

    def call(self, case: str, index: int) -> Call:
        """Return the arguments of one judging call; redrawn where the factory ignores its seed."""
        if (case, index) not in self._made:
            call = batch_calls(self.workload, self.reference, self.mode, self.batch(case, index))
            if index and digest_of(call) == digest_of(self.call(case, 0)):
                call = self._accepted(redrawn(call, self.seed + index), call)
            self._made[case, index] = call
        return self._made[case, index]

    def _accepted(self, varied: Call, own: Call) -> Call:
        """Return inputs that we varied where the unmodified model takes them, else the workload's own."""

        def compute() -> bool:
            def once() -> Flat:
                return flatten(run(clone_model(self.reference), clone_call(varied), self.mode, self.seed)).frozen()

            seen, error = attempt(lambda: (once(), once()))
            if error or seen[0].has_nan() or seen[0].kinds != seen[1].kinds:
                return False
            apart = compare_values(seen[1], seen[0]).values()  # inputs that read beyond a buffer give anything
            return all(e.row <= _UNDEFINED for e in apart)

        if self.memo.get(f"accepted {self.identity} {digest_of(varied)}", compute):
            return varied
        self._note("other values than the workload's own inputs: the unmodified model does not take them")
        return own

    def calls(self, case: str) -> list[tuple[Call, int]]:
        """Return the sequence of judging calls of a case, each with its random seed: some inputs come twice."""
        if case not in self._calls:
            first = case == next(iter(self.workload.cases))
            count = _SEEDS[self.level] if first else 1
            distinct = [(self.call(case, i), self.seed + i) for i in range(count)]
            repeats = distinct[:2] if first else distinct
            calls = [*distinct[:2], *repeats, *distinct[2:]]
            self._calls[case] = calls + distinct[:1] * (_MIN_CALLS[self.level] - len(calls) if first else 0)
        return self._calls[case]

    def observed(self, case: str) -> Observed:
        """Return what the unmodified model does in the sequence of judging calls.

        Raises:
            ModelError: It raises, or gives NaN.
        """
        calls = self.calls(case)
        key = f"observed {self.identity} {case} {self.level} {[(digest_of(c), s) for c, s in calls]}"
        seen = Observed.from_dict(self.memo.get(key, lambda: self._observe(calls).as_dict()))
        if seen.error:
            raise ModelError(f"the unmodified model raises at {seen.error}")
        for i, flat in enumerate(seen.outputs):
            if path := flat.has_nan():
                raise ModelError(f"the unmodified model gives NaN in {path} at call {i + 1} of case {case!r}")
        return seen

    def _observe(self, calls: list[tuple[Call, int]]) -> Observed:
        """Run the sequence, but only up to the first repeat where that gives equal bits and leaves nothing behind."""
        first = [next(j for j, (c, s) in enumerate(calls) if c is call and s == seed) for call, seed in calls]
        repeat = next((i for i, j in enumerate(first) if j < i), len(calls))
        if all(j < repeat for j in first):
            seen = observe(clone_model(self.reference), calls[: repeat + 1], self.mode)
            left = seen.drew or seen.error or seen.mutated or seen.overwritten or seen.changed
            if not left and same_bits(seen.outputs[repeat], seen.outputs[first[repeat]]):
                seen.outputs, seen.inputs = ([flats[j] for j in first] for flats in (seen.outputs, seen.inputs))
                seen.settled = True
                return seen
        return observe(clone_model(self.reference), calls, self.mode)

    def noise(self, case: str) -> float:
        """Return the worst error between two runs of the unmodified model on one input and seed."""
        calls = self.calls(case)
        if self.observed(case).settled:
            return 0.0
        key = f"noise {self.identity} {case} {digest_of(calls[0][0])}"

        def compute() -> float:
            again = observe(clone_model(self.reference), calls[:1], self.mode)
            errors = compare_values(again.outputs[0], self.observed(case).outputs[0])
            return max((e.row for e in errors.values()), default=0.0)

        return float(self.memo.get(key, compute))

    def exact(self, case: str, index: int) -> Flat:
        """Return the outputs of the judging call `index` of a case in fp64, hard-coded casts lifted.

        Where the model treats samples apart, only a few of a large batch are computed in fp64; the other rows are the
        unmodified model's own.
        """
        call, seed = self.calls(case)[index]
        key = f"exact {self.identity} {digest_of(call)} {seed}"

        def compute() -> dict[str, Any]:
            rows = self._rows(case, index)
            part = rows_of(call, rows) if rows else call
            flat, error = attempt(lambda: self._lifted(part, seed))
            return {"flat": None if error else flat.as_dict(), "error": error, "rows": rows}

        found = self.memo.get(key, compute)
        own = self.observed(case).outputs[index]
        if found["flat"] is None:
            self.exact_dtype = "float32"
            self._note(f"the model does not run in fp64 ({found['error']}); its own precision is the reference")
            return own
        flat = Flat(**found["flat"])
        return _with_rows(own, flat, found["rows"]) if found["rows"] else flat

    def _rows(self, case: str, index: int) -> list[int]:
        """Return which samples stand for a call: none where it is small, or the model does not treat samples apart."""
        call, seed = self.calls(case)[index]
        size = batch_size(call)
        if size < _SLICED_FROM:
            return []
        rows = [round(i * (size - 1) / (_ROWS - 1)) for i in range(_ROWS)]
        part = rows_of(call, rows)
        out, error = attempt(lambda: run(clone_model(self.reference), clone_call(part), self.mode, seed))
        if error:
            return []
        few, full = flatten(out), self.observed(case).outputs[index]
        if few.scalars != full.scalars or few.tensors.keys() != full.tensors.keys():
            return []
        for path, want in full.tensors.items():
            got = few.tensors[path]
            if not want.dim() or want.shape[0] != size or got.shape != (len(rows), *want.shape[1:]):
                return []
            if not tensor_error(got, want[rows]).row <= _SLICE_ROUNDING:
                return []
        return rows

    def _lifted(self, call: Call, seed: int) -> Flat:
        model = lifted_model(clone_model(self.reference))
        args, kwargs = lift_tree((call.args, dict(call.kwargs)))
        with lifted():
            return flatten(run(model, clone_call(Call(args, kwargs)), self.mode, seed)).frozen()

    def cast(self, case: str, index: int, dtype: torch.dtype) -> Flat | None:
        """Return the outputs under plain casting of parameters and inputs, outputs cast back; `None` if it raises."""
        call, seed = self.calls(case)[index]
        key = f"cast {dtype} {self.identity} {digest_of(call)} {seed}"

        def compute() -> dict[str, Any]:
            flat, error = attempt(lambda: self._cast(call, seed, dtype))
            return {"flat": None if error else flat.as_dict(), "error": error}

        found = self.memo.get(key, compute)
        return None if found["flat"] is None else Flat(**found["flat"])

    def emulated(self, case: str, index: int, step: Step, emulate: Emulation) -> Flat | None:
        """Return the outputs where operands are rounded as a step rounds them, all else as it was; `None` if it raises.

        Args:
            case: Name of the case.
            index: Of the judging call.
            step: The step.
            emulate: Rounds in a copy of the model, in the model's own precision.
        """
        call, seed = self.calls(case)[index]
        key = f"emulated {step} {self.identity} {digest_of(call)} {seed}"

        def compute() -> dict[str, Any]:
            model = emulate(clone_model(self.reference), step)
            flat, error = attempt(lambda: flatten(run(model, clone_call(call), self.mode, seed)).frozen())
            return {"flat": None if error else flat.as_dict(), "error": error}

        found = self.memo.get(key, compute)
        return None if found["flat"] is None else Flat(**found["flat"])

    def _cast(self, call: Call, seed: int, dtype: torch.dtype) -> Flat:
        if self.mode is Mode.TRAINING:
            device = next((p.device.type for p in self.reference.parameters()), "cpu")
            with torch.autocast(device, dtype):
                return flatten(run(clone_model(self.reference), clone_call(call), self.mode, seed)).frozen()

        def low(leaf: Any) -> Any:
            return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

        model = clone_model(self.reference)
        model._apply(low)  # type: ignore[no-untyped-call]  # noqa: SLF001
        args, kwargs = pytree.tree_map(low, (call.args, dict(call.kwargs)))
        return flatten(run(model, clone_call(Call(args, kwargs)), self.mode, seed)).frozen()

    def _note(self, text: str) -> None:
        if text not in self.unchecked:
            self.unchecked.append(text)


def _with_rows(own: Flat, part: Flat, rows: list[int]) -> Flat:
    """Return the unmodified model's outputs with some samples replaced by those computed in fp64."""
    tensors = {}
    for path, value in own.tensors.items():
        tensors[path] = value.to(part.tensors[path].dtype, copy=True)
        tensors[path][rows] = part.tensors[path].to(value.device)
    return replace(own, tensors=tensors)


def digest_of(call: Call) -> str:
    """Return a hash of the values of a call."""
    return digest((call.args, dict(call.kwargs)))
