"""Gate 3: low-precision kernels at their own sites, against fp64 arithmetic on their quantised operands.

A site is a module of the candidate that the reference has under the same path. `SITES` lists what is recognised: add a
pair (`matches`, `check`) to it for another kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from kernel_pytorch.core.program import clone_call, clone_model, plain_call
from kernel_pytorch.core.types import Check, Gate, Mode
from kernel_pytorch.core.workload import Call
from kernel_pytorch.validation.float8 import check_float8_linear, check_float8_mlp, is_float8_linear, is_float8_mlp
from kernel_pytorch.validation.subject import attempt, run

__all__ = ["SITES", "kernel_checks"]

_ROWS = 64
_SLACK = 1.02
_ROUNDINGS = 2.0
"""Units of 16-bit rounding in a product: its result, the scale of its channel, the bias added."""
_ACCUMULATED = 64.0
"""The same in fp32, where thousands of terms are added."""
_UNKNOWN_ACTIVATION = 3.0
"""Times the expected norm of rounding activations to 8 bits; the norm over 64 rows hardly scatters."""


def _is_quantised_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and weight is not None and _module_of(weight).startswith("torchao")


def _module_of(weight: torch.Tensor) -> str:
    return str(type(weight.data if type(weight) is nn.Parameter else weight).__module__)


def _bits(stored: torch.Tensor) -> int:
    return (4 if "int4" in type(stored).__name__.lower() else 8) - bool(getattr(stored, "reduce_range", False))


def _largest(value: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Return for each element of `[rows, columns]` the largest magnitude among those that share its scale."""
    size = value.abs()
    block = list(getattr(stored, "block_size", None) or (1, size.shape[1]))[-2:]
    rows, columns = (min(b, n) for b, n in zip(block, size.shape, strict=True))
    if size.shape[0] % rows or size.shape[1] % columns:
        rows, columns = 1, size.shape[1]
    blocks = size.view(size.shape[0] // rows, rows, size.shape[1] // columns, columns)
    return blocks.amax((1, 3), keepdim=True).expand_as(blocks).reshape(size.shape)


def _rounding(value: torch.Tensor, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return by how much rounding to the format of `stored` may move each element: half a step of its block's scale.

    A symmetric or affine grid of `b` bits over a block whose largest magnitude is `m` has steps of at most
    `2 m / (2^b - 1)`. Scales, and the zero points of 4-bit blocks, are rounded to `dtype`, as the value was before.
    """
    size, largest, bits, unit = value.abs(), _largest(value, stored), _bits(stored), torch.finfo(dtype).eps
    format_ = getattr(getattr(stored, "qdata", None), "dtype", torch.int8)
    if format_.is_floating_point:
        limits = torch.finfo(format_)
        least = largest / limits.max * limits.smallest_normal * limits.eps
        return _SLACK * (limits.eps / 2 * size + least) + unit * size
    given = unit * size if bits > 4 else 4 * unit * largest
    half: torch.Tensor = largest / (2**bits - 1)
    return _SLACK * half + given


def _worst_ratio(off: torch.Tensor, allowed: torch.Tensor) -> float:
    ratio = torch.where(off == 0, 0.0, off / allowed)
    return float(ratio.nan_to_num(math.inf).max()) if ratio.numel() else 0.0


def _dequantised(stored: Any) -> torch.Tensor | None:
    """Return the values of a quantised tensor as fp64; `None` where its class has no such function."""
    for read in (lambda: stored.dequantize(torch.float32), lambda: stored.dequantize()):  # noqa: PLW0108
        value, error = attempt(read)
        if not error:
            return cast("torch.Tensor", value).double()
    return None


def _weight(site: nn.Linear, stored: torch.Tensor) -> torch.Tensor:
    """Return the weight that a site multiplies with, fp64: dequantised, or what it makes of the unit vectors."""
    weight = _dequantised(stored)
    if weight is not None:
        return weight
    unit = torch.eye(site.in_features, dtype=stored.dtype, device=stored.device)
    return nn.functional.linear(unit, site.weight).double().T  # without the bias, which would round small weights


def _quantised_activation(stored: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor | None, Any]:
    """Return what a site makes of its input before multiplying, fp64, and the quantised form; `None` if not known."""
    settings = getattr(stored, "act_quant_kwargs", None)
    scale = getattr(stored, "act_pre_scale", None)
    x = x if scale is None else x * scale
    if settings is None:
        return x.double(), None

    def quantise() -> Any:
        from torchao.quantization.quantize_ import common

        return common._choose_quant_func_and_quantize_tensor(  # noqa: SLF001  # what its linear calls
            x, settings, scale=getattr(stored, "act_quant_scale", None),
            zero_point=getattr(stored, "act_quant_zero_point", None),
        )  # fmt: skip

    quantised, error = attempt(quantise)
    value = None if error else _dequantised(quantised)
    return value, None if value is None else quantised


def _check_linear(name: str, site: nn.Module, plain: nn.Module, x: torch.Tensor) -> list[Check]:
    """Check that weight and activation are rounded as their format rounds, and that the product is theirs.

    The product is compared by output channel, so that one wrong scale shows.
    """
    assert isinstance(site, nn.Linear)
    assert isinstance(plain, nn.Linear)
    stored = site.weight.data if type(site.weight) is nn.Parameter else site.weight
    weight, error = attempt(lambda: _weight(site, stored))
    if error:
        return [Check(f"{name}.weight", Gate.KERNEL, math.inf, 1.0, f"cannot be read: {error}")]
    true = plain.weight.detach().double()
    ratio = _worst_ratio((weight - true).abs(), _rounding(true, stored, stored.dtype))
    detail = f"an element is {ratio:.2g} times the rounding of its format from the reference's"
    checks = [_named(f"{name}.weight", ratio, detail)]
    y, error = attempt(lambda: site(x).double())
    if error:
        return [*checks, Check(name, Gate.KERNEL, math.inf, 1.0, f"raises {error}")]
    seen, quantised = _quantised_activation(stored, x)
    if quantised is not None and seen is not None:
        ratio = _worst_ratio((seen - x.double()).abs(), _rounding(x.double(), quantised, x.dtype))
        checks.append(_named(f"{name}.input", ratio, f"an element is {ratio:.2g} times the rounding of its format off"))
    inside = x.double() if seen is None else seen
    bias = torch.zeros(len(true), dtype=torch.float64) if plain.bias is None else plain.bias.detach().double()
    want = inside @ weight.T + bias.to(inside.device)
    size = weight if _bits(stored) > 4 else _largest(true, stored)  # values and zero points apart
    terms = (inside.square() @ size.square().T).sum(0).sqrt()
    units = torch.finfo(x.dtype).eps * (_ROUNDINGS if x.dtype.itemsize == 2 else _ACCUMULATED)
    allowed = units * (want.norm(dim=0) + bias.to(want.device).abs() * len(x) ** 0.5 + terms)
    if seen is None:
        steps = 2 / 255 * inside.abs().amax(1)
        allowed = allowed + _UNKNOWN_ACTIVATION * float(steps.norm()) / 12**0.5 * weight.norm(dim=1)
    ratio = _worst_ratio((y - want).norm(dim=0), allowed)
    detail = f"a channel is {ratio:.2g} times rounding from fp64 on its own quantised operands and the reference's bias"
    return [*checks, _named(name, ratio, detail)]


def _named(name: str, ratio: float, detail: str) -> Check:
    return Check(name, Gate.KERNEL, ratio, 1.0, "" if ratio <= 1.0 else detail)


SITES: list[tuple[Callable[[nn.Module], bool], Callable[[str, nn.Module, nn.Module, torch.Tensor], list[Check]]]] = [
    (_is_quantised_linear, _check_linear),
    (is_float8_linear, check_float8_linear),
    (is_float8_mlp, check_float8_mlp),
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
            dtype = getattr(getattr(module, "weight", None), "dtype", inputs[name].dtype)
            with torch.no_grad():
                checks += check(name, module, theirs[name], inputs[name].to(dtype))
    return checks
