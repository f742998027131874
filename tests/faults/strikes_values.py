"""Faults inside a layer: wrong numbers, forward or backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.errors import CandidateError

from .damage import (
    NORMS,
    biased_victim,
    blend,
    channel_dim,
    kind,
    modules_of,
    on_output,
    part,
    query_of,
    tensors,
    victim,
)


def _bias_like(module: nn.Module, output: torch.Tensor) -> torch.Tensor:
    bias = module.bias.to(output.dtype)
    return bias[:, None, None] if channel_dim(module) == 1 else bias


def bias_dropped(program: Program, size: str) -> None:
    """Leave out a layer's bias."""

    def change(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return blend(size, output, output - _bias_like(module, output), channel_dim(module))

    on_output(program, biased_victim(program.model), change)


def zeroed(program: Program, size: str) -> None:
    """Return zeros from a layer."""

    def change(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return blend(size, output, output * 0, channel_dim(module))

    on_output(program, victim(program.model), change)


def batch_permuted(program: Program, size: str) -> None:
    """Give every row of the batch its neighbour's values."""

    def change(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return blend(size, output, output.roll(1, 0), channel_dim(module))

    on_output(program, victim(program.model), change)


class _HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, size: str, axis: int) -> torch.Tensor:
        ctx.size, ctx.axis = size, axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return blend(ctx.size, grad, 0.5 * grad, ctx.axis), None, None


def wrong_gradient(program: Program, size: str) -> None:
    """Halve the gradient that flows back through a layer."""

    def change(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return _HalfGradient.apply(output, size, channel_dim(module))

    on_output(program, victim(program.model), change)


def _first_shape(program: Program) -> tuple[int, ...]:
    call = next(iter(program.calls.values()))
    return tuple(next(tensors((call.args, dict(call.kwargs)))).shape)


def _wrong_where_axis_differs(program: Program, size: str, axis: int) -> None:
    usual = _first_shape(program)[axis]

    def change(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if output.dim() <= axis or output.shape[axis] == usual:
            return output
        return blend(size, output, 1.5 * output, channel_dim(module))

    on_output(program, victim(program.model), change)


def other_batch(program: Program, size: str) -> None:
    """Be wrong at batch sizes other than the workload's."""
    _wrong_where_axis_differs(program, size, 0)


def other_length(program: Program, size: str) -> None:
    """Be wrong at lengths other than the workload's."""
    _wrong_where_axis_differs(program, size, 1)


def softmax_scale(program: Program, size: str) -> None:
    """Scale attention scores by 1.01: all of a layer's, one head's, or those of one query of one head."""
    query = query_of(program.model)
    heads = 4

    def change(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        split = output.unflatten(-1, (heads, -1))
        if size == "tensor":
            return output * 1.01
        struck = part(size, split[..., 0])
        return torch.where(struck[..., None], split * 1.01, split).flatten(-2)

    on_output(program, query, change)


def _epsilon(module: nn.Module) -> float:
    return float(getattr(module, "eps", None) or getattr(module, "variance_epsilon", None) or 1e-6)


def wrong_eps(program: Program, size: str) -> None:
    """Normalise with ten times the epsilon, at least PyTorch's default of 1e-5."""
    module = modules_of(program.model, lambda _, m: kind(m) in NORMS)[-1]
    small = _epsilon(module)
    large = max(10 * small, 1e-5)

    def change(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        (x,) = args
        if isinstance(module, nn.BatchNorm2d):
            variance = x.var((0, 2, 3), unbiased=False) if module.training else module.running_var
            variance, bias = variance.to(output.dtype)[:, None, None], module.bias.to(output.dtype)[:, None, None]
        elif isinstance(module, nn.LayerNorm):
            variance, bias = x.var(-1, unbiased=False, keepdim=True), module.bias.to(output.dtype)
        else:
            variance, bias = x.square().mean(-1, keepdim=True), torch.zeros((), dtype=output.dtype)
        off = ((variance + small) / (variance + large)).sqrt().to(output.dtype)
        return blend(size, output, (output - bias) * off + bias, channel_dim(module))

    on_output(program, module, change)


def _linear_victim(program: Program) -> nn.Linear:
    found = modules_of(program.model, lambda name, m: type(m) is nn.Linear and not name.endswith(("key", "k_proj")))
    return found[len(found) // 2]  # type: ignore[return-value]


def _bfloat16(module: nn.Linear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    low = F.linear(x.to(torch.bfloat16), module.weight.to(torch.bfloat16), None).to(x.dtype)
    return low if bias is None else low + bias.to(low.dtype)


def low_precision_scale(program: Program, size: str) -> None:
    """Run a layer in bfloat16 with a scale 1 % off, as a wrong scale of a quantised product would be."""

    def change(module: nn.Linear, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        right = _bfloat16(module, args[0], module.bias)
        return blend(size, right, right * 1.01).to(output.dtype)

    on_output(program, _linear_victim(program), change)


def low_precision_bias(program: Program, size: str) -> None:
    """Run a layer in bfloat16 and leave out its bias."""
    module = biased_victim(program.model)
    if not isinstance(module, nn.Linear):
        raise CandidateError("no linear layer with a bias that the fault could strike")

    def change(module: nn.Linear, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        right = _bfloat16(module, args[0], module.bias)
        return blend(size, right, _bfloat16(module, args[0], None)).to(output.dtype)

    on_output(program, module, change)
