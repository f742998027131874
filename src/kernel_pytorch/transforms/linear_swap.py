"""Run `nn.Linear` modules on packed copies of their weights, with the modules and their parameters left in place.

The packed call sits in the slot that `nn.Module.compile` uses, which copying and pickling drop, so that a copy of the
model is the plain model again and `state_dict` is untouched. Hooks keep working: a hooked module runs its own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.errors import CandidateError

__all__ = ["packable_linears", "packed_call", "swap_linears"]

Pack = Callable[[nn.Linear], Callable[[torch.Tensor], torch.Tensor]]


def packable_linears(model: nn.Module) -> list[nn.Linear]:
    """Return the plain `nn.Linear` modules on the CPU whose weight is an ordinary parameter of their own class."""
    return [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and type(module._parameters.get("weight")) is nn.Parameter  # noqa: SLF001
        and module.weight.device.type == "cpu"
        and module.weight.layout is torch.strided
        and module.weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and module.weight.numel() > 0
    ]


def packed_call(module: nn.Linear, pack: Pack) -> Callable[..., Any]:
    """Return a call of `module` on packed weights, made at the first use and again whenever the weights change."""
    held: dict[str, Any] = {"stamp": None, "run": None}

    def call(*args: Any, **kwargs: Any) -> Any:
        weight, bias = module.weight, module.bias
        hooked = module._forward_hooks or module._forward_pre_hooks  # noqa: SLF001
        if hooked or kwargs or len(args) != 1 or args[0].dtype is not weight.dtype or torch.is_grad_enabled():
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]  # noqa: SLF001
        stamp = [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in (weight, bias) if t is not None]  # noqa: SLF001
        if stamp != held["stamp"]:
            held["run"], held["stamp"] = pack(module), stamp
        return held["run"](args[0])

    return call


def swap_linears(program: Program, pack: Pack) -> int:
    """Put a packed call into the slot of each linear layer of a program, undoable, and return how many there are.

    Raises:
        CandidateError: There are none.
    """
    linears = packable_linears(program.model)
    if not linears:
        raise CandidateError("the model has no plain nn.Linear on the CPU")
    for linear in linears:
        before = vars(linear).get("_compiled_call_impl")
        program.undo.append(lambda linear=linear, before=before: _set_call(linear, before))  # type: ignore[misc]
        _set_call(linear, packed_call(linear, pack))
    return len(linears)


def _set_call(linear: nn.Linear, call: Any) -> None:
    linear._compiled_call_impl = call  # noqa: SLF001
