"""Gate 3 at the sites of FP8 training: each product near-exact on its own operands, a fused MLP as its layers apart."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from kernel_pytorch.core.types import Check, Gate
from kernel_pytorch.precision.emulate import multiplied
from kernel_pytorch.precision.linear import swap_linear
from kernel_pytorch.precision.mlp import MLP_SLOT, restore_mlp
from kernel_pytorch.precision.site import Site, site_of
from kernel_pytorch.validation.subject import attempt

__all__ = ["check_float8_linear", "check_float8_mlp", "is_float8_linear", "is_float8_mlp"]

_ROUNDINGS = 2.0
"""Units of the result's rounding: its own, and the bias added."""
_FAST = 2.0**-13
"""Relative to the terms of a sum: what accumulators of tensor cores keep of them at least (14 bits on Hopper)."""
_AS_APART = 1.1
"""A fused MLP may be this much further from fp64 than its layers apart, whose roundings are other draws."""


def is_float8_linear(module: nn.Module) -> bool:
    """Return whether a layer runs in FP8."""
    return isinstance(module, nn.Linear) and site_of(module) is not None


def is_float8_mlp(module: nn.Module) -> bool:
    """Return whether a gated MLP runs in FP8 as one."""
    return MLP_SLOT in vars(module)


def _ratio(got: torch.Tensor, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None) -> float:
    """Return how far a product of fp64 operands is off, by column, in units of what rounding explains."""
    want = left @ right
    allowed = _ROUNDINGS * torch.finfo(got.dtype).eps * want.norm(dim=0)
    if bias is not None:
        want = want + bias.double()
        allowed = allowed + _ROUNDINGS * torch.finfo(got.dtype).eps * bias.double().abs() * len(want) ** 0.5
    terms = (left.square() @ right.square()).sum(0).sqrt()
    allowed = allowed + (_FAST * left.shape[1] ** 0.5 + _ROUNDINGS * torch.finfo(got.dtype).eps) * terms
    off = (got.double() - want).norm(dim=0)
    return float(torch.where(off == 0, 0.0, off / allowed).nan_to_num(math.inf).max())


def check_float8_linear(name: str, site: nn.Module, plain: nn.Module, x: torch.Tensor) -> list[Check]:
    """Check result, input's and weight's gradient of one layer against fp64 on the operands that its recipe casts.

    A wrong scale, a wrong transpose or a gradient of another layer shows; the rounding of the operands does not.
    """
    assert isinstance(site, nn.Linear)
    assert isinstance(plain, nn.Linear)
    own = site_of(site)
    assert own is not None
    recipe, weight = own.recipe, site.weight.detach()
    leaf = x.detach().clone().requires_grad_()
    made = torch.Generator(x.device).manual_seed(0)
    dy = torch.randn((len(x), site.out_features), device=x.device, dtype=torch.float32, generator=made).to(x.dtype)
    # A copy, so that neither gradients nor scales of what ships move.
    alone = copy.deepcopy(site) if len(own.layers) == 1 else _alone(site, own)
    alone.zero_grad(set_to_none=True)
    with torch.enable_grad():
        out, error = attempt(lambda: alone(leaf))
        if not error:
            _, error = attempt(lambda: out.backward(dy))
        if error:
            return [Check(name, Gate.KERNEL, math.inf, 1.0, f"raises {error}")]
    mine = site_of(alone)
    assert mine is not None
    products = {"": (recipe.forward, out.detach()), ".dx": (recipe.input_gradient, leaf.grad)}
    if alone.weight.grad is not None:
        products[".dw"] = (recipe.weight_gradient, alone.weight.grad)
    checks = []
    for which, (product, got) in products.items():
        if not product.float8 or got is None:
            continue
        left, right = {
            "": lambda: (multiplied(x, mine, "input", summed=1), multiplied(weight, mine, "weight", summed=1).t()),
            ".dx": lambda: (multiplied(dy, mine, "gradient", summed=1), multiplied(weight, mine, "weight", summed=0)),
            ".dw": lambda: (multiplied(dy, mine, "gradient", summed=0).t(), multiplied(x, mine, "input", summed=0)),
        }[which]()
        ratio = _ratio(got, left, right, plain.bias if which == "" else None)
        detail = f"a column is {ratio:.2g} times rounding from fp64 on its own operands in FP8"
        checks.append(Check(f"{name}{which}", Gate.KERNEL, ratio, 1.0, "" if ratio <= 1.0 else detail))
    return checks


def _alone(layer: nn.Linear, site: Site) -> nn.Linear:
    """Return a copy of one of several layers that read the same tensor, by itself."""
    fresh = nn.Linear(
        layer.in_features, layer.out_features, bias=layer.bias is not None, device=layer.weight.device,
        dtype=layer.weight.dtype,
    )  # fmt: skip
    fresh.load_state_dict(layer.state_dict())
    swap_linear(fresh, site.recipe)
    return fresh


def check_float8_mlp(name: str, site: nn.Module, plain: nn.Module, x: torch.Tensor) -> list[Check]:
    """Check that a fused MLP, and each gradient, is no further from fp64 than its layers in FP8 apart."""
    _, last, _ = vars(site)[MLP_SLOT]
    apart = copy.deepcopy(site)
    restore_mlp(apart)
    exact = copy.deepcopy(plain).double()
    made = torch.Generator(x.device).manual_seed(0)
    dy = torch.randn((len(x), last.layers[0].out_features), device=x.device, generator=made)
    found: list[dict[str, torch.Tensor]] = []
    for module in (copy.deepcopy(site), apart, exact):
        dtype = next(module.parameters()).dtype
        leaf = x.detach().to(dtype).clone().requires_grad_()
        module.zero_grad(set_to_none=True)

        def once(module: nn.Module = module, leaf: torch.Tensor = leaf) -> dict[str, torch.Tensor]:
            out = module(leaf)
            out.backward(dy.to(out.dtype))
            grads = {k: p.grad for k, p in module.named_parameters() if p.grad is not None}
            assert leaf.grad is not None
            return {"": out.detach(), "dx": leaf.grad, **grads}

        with torch.enable_grad():
            values, error = attempt(once)
        if error:
            return [Check(name, Gate.KERNEL, math.inf, 1.0, f"raises {error}")]
        found.append(values)
    checks = []
    for what, want in found[2].items():
        mine, theirs = (float((values[what].double() - want).norm()) for values in found[:2])
        unit = torch.finfo(found[0][what].dtype).eps * float(want.norm())
        ratio = mine / max(_AS_APART * theirs + unit, 1e-300)
        detail = f"is {ratio:.2g} times as far from fp64 as its layers in FP8 apart"
        label = f"{name}.{what}".rstrip(".")
        checks.append(Check(label, Gate.KERNEL, ratio, 1.0, "" if ratio <= 1.0 else detail))
    return checks
