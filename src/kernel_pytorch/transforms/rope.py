"""Turn queries and keys by `ops.rope`: the modules stay, and find another function under the name they call.

`torch.compile` folds the cosines of all positions into the loop over the heads, and computes them again for each: on an
H200 both directions of Llama-3-8B's rotation took 6.8 ms of a step, where memory takes 1.5.

A function is matched by what it computes: one that a module's `forward` calls, with parameters named `cos` and `sin`,
is run in float64 on random inputs beside the definition. Where a call does not look like those (another rank, other
arguments), the model's own function runs. `forward` is set on the instance; pickling drops it.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from kernel_pytorch._triton.launch import cannot_run
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.ops.rope import rope
from kernel_pytorch.transforms.ceilings import FUSIBLE, bounded

__all__ = ["Rope"]

_VENDORS = ("nvidia", "amd")
_NAMES = ("rotary", "rope")
_EXACT = 1e-12


class Rope:
    """Replace functions of the form `(q, k, cos, sin) -> (q * cos + rotate_half(q) * sin, ...)`."""

    name = "rope"
    summary = "rotary position embedding of queries and keys in one pass over memory"
    group = "rope"
    numerics = Numerics.REORDERED
    modes = frozenset({Mode.INFERENCE, Mode.TRAINING})
    compiles = False

    def probe(self, device: DeviceSpec) -> Skip | None:
        """Triton runs on NVIDIA and AMD GPUs."""
        if device.vendor not in _VENDORS:
            return Skip(f"the kernel runs on GPUs of {' and '.join(_VENDORS)}, not on {device.vendor}")
        return cannot_run()

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """One step, by class names, for `apply` looks at the modules."""
        skip = self.probe(device)
        if skip is not None:
            return skip
        if not any(word in name.lower() for word in _NAMES for name in workload.modules):
            return Skip("the model has no module that looks like a rotary position embedding")
        return [Step(self.name)]

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """The rotation is elementwise, and surrounded by copies."""
        del step, device
        return bounded(prediction, dict.fromkeys(FUSIBLE, 0.0))

    def apply(self, program: Program, step: Step) -> Program:
        """Give each module that calls such a function a `forward` that calls the kernel; `undo` takes it back."""
        known: dict[int, bool] = {}
        swapped = [m for m in program.model.modules() if _swap(m, known)]
        if not swapped:
            raise CandidateError(f"{step}: no module of this model calls a rotation of queries and keys")
        program.undo.append(lambda: _restore(swapped))
        program.notes.append(f"kernels: {len(swapped)} x rope")
        return program

    def source(self, step: Step) -> str:
        """It has none: the kernel is Triton code of this package.

        Raises:
            CandidateError: Always.
        """
        raise CandidateError(
            f"{step} cannot be written as plain PyTorch: its kernel is part of kernel_pytorch",
            fix="keep using the plan with kernel_pytorch, or optimise without rope",
        )


class _Turn:
    """The kernel for calls of the usual form, else the model's own function."""

    def __init__(self, own: Callable[..., Any]) -> None:
        self.own = own

    def __call__(self, q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        axis = kwargs.get("unsqueeze_dim", 1)
        usual = not args and len(kwargs) == ("unsqueeze_dim" in kwargs) and axis in (1, 2)
        if not usual or not _fits(q, k, cos, sin, position=3 - axis):
            return self.own(q, k, cos, sin, *args, **kwargs)
        return rope(q, k, cos, sin, layout="bhsd" if axis == 1 else "bshd")


def _fits(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, position: int) -> bool:
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or q.dtype != k.dtype or cos.requires_grad or sin.requires_grad:
        return False
    same = q.shape[0] == k.shape[0] and q.shape[position] == k.shape[position] and q.shape[3] == k.shape[3]
    angles = cos.shape == sin.shape and cos.shape[1] == q.shape[position] and cos.shape[2] == q.shape[3]
    return same and angles and (cos.shape[0] == 1 or cos.shape[0] == q.shape[0])


def _swap(module: nn.Module, known: dict[int, bool]) -> bool:
    """Set another `forward` on a module that calls a rotation; return whether it does."""
    bound = module.forward
    function = getattr(bound, "__func__", None)
    if not isinstance(function, types.FunctionType) or getattr(bound, "__self__", None) is not module:
        return False
    scope = function.__globals__
    names = [name for name in function.__code__.co_names if _looks_like_one(scope.get(name))]
    found = [name for name in names if known.setdefault(id(scope[name]), _is_rotation(scope[name]))]
    if not found or "forward" in vars(module):
        return False
    scope = {**scope, **{name: _Turn(scope[name]) for name in found}}
    scope.pop("__name__", None)  # by it Dynamo would look the names up in the original module
    twin = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    module.forward = types.MethodType(twin, module)
    return True


def _restore(modules: list[nn.Module]) -> None:
    for module in modules:
        vars(module).pop("forward", None)


def _looks_like_one(value: Any) -> bool:
    if not isinstance(value, types.FunctionType):
        return False
    return {"cos", "sin"} <= {*inspect.signature(value).parameters}


def _is_rotation(function: Callable[..., Any]) -> bool:
    """Return whether a function computes the definition, in float64, with angles whose halves differ."""
    made = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(shape, generator=made, dtype=torch.float64)
        for shape in ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8))
    )
    try:
        got = function(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False
    want = rope(q, k, cos, sin, impl="reference")
    return (
        isinstance(got, tuple)
        and len(got) == 2
        and all(
            isinstance(x, torch.Tensor) and x.shape == y.shape and bool((x - y).norm() <= _EXACT * y.norm())
            for x, y in zip(got, want, strict=True)
        )
    )
