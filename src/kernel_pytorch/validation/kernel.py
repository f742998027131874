"""Gate 3: low-precision kernels at their own sites, against fp64 arithmetic on their quantised operands.

A site is a module of the candidate that the reference has under the same path. `SITES` lists what is recognised: add a
pair (`matches`, `check`) to it for another kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from kernel_pytorch.core.program import clone_call, clone_model, plain_call
from kernel_pytorch.core.types import Check, Gate, Mode
from kernel_pytorch.core.workload import Call
from kernel_pytorch.validation.compare import tensor_error
from kernel_pytorch.validation.subject import attempt, run

__all__ = ["SITES", "kernel_checks"]

_ROWS = 64
_WEIGHT_BUDGET = {"int8": 0.02, "float8": 0.05, "int4": 0.25}
"""Worst channel's error of rounding to the format: half a step of 1/127, 3 mantissa bits, half a step of 1/7."""
_OUTPUT_BUDGET = 3e-2
"""Rounding an activation to 8 bits per token, or the result to bfloat16."""


def _is_quantised_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and weight is not None and hasattr(weight, "dequantize") and (
        type(weight.data if type(weight) is nn.Parameter else weight).__module__.startswith("torchao")
    )


def _check_linear(name: str, site: nn.Module, plain: nn.Module, x: torch.Tensor) -> list[Check]:
    """Check that the weight is the reference's up to rounding, and the product that of the rounded weight."""
    assert isinstance(site, nn.Linear)
    assert isinstance(plain, nn.Linear)
    weight, error = attempt(lambda: site.weight.dequantize().double())
    if error:
        return [Check(f"{name}.weight", Gate.KERNEL, math.inf, 0.0, f"cannot be dequantised: {error}")]
    kind = repr(site.weight).lower()
    bits = "int4" if "int4" in kind or "uint4" in kind else "float8" if "float8" in kind else "int8"
    budget = _WEIGHT_BUDGET[bits]
    off = tensor_error(weight, plain.weight.detach().double()).row
    checks = [_named(f"{name}.weight", off, budget, f"is {off:.2g} from the reference's; {bits} rounding is not")]
    y, error = attempt(lambda: site(x))
    if error:
        return checks
    bias = plain.bias
    want = x.double() @ weight.T + (0 if bias is None else bias.double())
    off = tensor_error(y, want, samples=True).row
    detail = f"is {off:.2g} from fp64 on its own quantised weight and the reference's bias"
    checks.append(_named(name, off, _OUTPUT_BUDGET, detail))
    return checks


def _named(name: str, error: float, budget: float, detail: str) -> Check:
    return Check(name, Gate.KERNEL, error, budget, "" if error <= budget else detail)


SITES: list[tuple[Callable[[nn.Module], bool], Callable[[str, nn.Module, nn.Module, torch.Tensor], list[Check]]]] = [
    (_is_quantised_linear, _check_linear),
]


def kernel_checks(candidate: nn.Module, reference: nn.Module, call: Call, mode: Mode) -> list[Check]:
    """Feed every recognised site of a candidate the reference's own inputs and check what it computes."""
    theirs = dict(reference.named_modules())
    sites = {
        name: (module, check)
        for name, module in candidate.named_modules()
        for matches, check in SITES
        if name in theirs and matches(module)
    }
    if not sites:
        return []
    inputs: dict[str, torch.Tensor] = {}
    model = clone_model(reference)
    for name, module in model.named_modules():
        if name in sites:

            def keep(_module: nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
                inputs.setdefault(name, args[0].detach().flatten(0, -2)[:_ROWS].clone())

            module.register_forward_pre_hook(keep)
    attempt(lambda: run(plain_call(model), clone_call(call), mode, 0))
    checks: list[Check] = []
    for name, (module, check) in sites.items():
        if name in inputs:
            dtype = next((p.dtype for p in [module.bias] if isinstance(p, torch.Tensor)), inputs[name].dtype)
            with torch.no_grad():
                checks += check(name, module, theirs[name], inputs[name].to(dtype))
    return checks
