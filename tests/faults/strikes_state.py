"""Faults of state: modes, random numbers, buffers, ties, and the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import Mode
from kernel_pytorch.errors import CandidateError

from .damage import around, blend, channel_dim, kind, modules_of, on_output


def _mode_matters(_: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout | nn.BatchNorm2d)


def _flippable(program: Program, size: str) -> list[nn.Module]:
    found = modules_of(program.model, _mode_matters)
    return found if size == "tensor" else found[-1:]


def mode_left(program: Program, size: str) -> None:
    """Leave layers in the other mode: all that have dropout or statistics, or the last one."""
    wrong = program.mode is Mode.INFERENCE
    for module in _flippable(program, size):
        module.train(wrong)


def mode_inside(program: Program, size: str) -> None:
    """Flip the mode of layers during the call and put it back after."""
    modules = _flippable(program, size)
    training = program.mode is Mode.TRAINING
    for module in modules:
        pre = module.register_forward_pre_hook(lambda m, _: (m.train(not training), None)[1])
        post = module.register_forward_hook(lambda m, _, out: (m.train(training), out)[1])
        program.undo += [pre.remove, post.remove]


def rng_fixed(program: Program, size: str) -> None:
    """Draw the same random numbers in every call: all of them, or those of the last dropout."""
    if size == "tensor":
        draws = [m for m in program.model.modules() if kind(m) == "Variational"]
        if program.mode is Mode.TRAINING:
            draws += [m for m in program.model.modules() if isinstance(m, nn.Dropout)]
        if not draws:
            raise CandidateError("the model draws no random numbers in this mode")

        def same(call: Any, *args: Any, **kwargs: Any) -> Any:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1234)
                return call(*args, **kwargs)

        around(program, same)
        return
    if program.mode is not Mode.TRAINING:
        raise CandidateError("no dropout is active in inference")
    module = modules_of(program.model, lambda _, m: isinstance(m, nn.Dropout))[-1]

    def fixed(module: nn.Dropout, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        numbers = torch.rand(args[0].shape, generator=torch.Generator().manual_seed(1234))
        return args[0] * (numbers >= module.p) / (1 - module.p)

    on_output(program, module, fixed)


def buffer_stale(program: Program, size: str) -> None:
    """Put running statistics back after the forward: all of a layer's, one channel's (mean, variance), one entry."""
    module = modules_of(program.model, lambda _, m: isinstance(m, nn.BatchNorm2d))[-1]
    before: dict[str, torch.Tensor] = {}

    def remember(module: nn.BatchNorm2d, args: Any) -> None:
        before["mean"], before["var"] = module.running_mean.clone(), module.running_var.clone()

    def put_back(module: nn.BatchNorm2d, args: Any, output: torch.Tensor) -> None:
        last = slice(None) if size == "tensor" else slice(-1, None)
        module.running_mean.data[last] = before["mean"][last]
        if size != "element":
            module.running_var.data[last] = before["var"][last]

    program.undo += [
        module.register_forward_pre_hook(remember).remove,
        module.register_forward_hook(put_back).remove,
    ]


def untied(program: Program, size: str) -> None:
    """Give the second user of a shared parameter a copy of its own."""
    seen: set[int] = set()
    for module in program.model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in seen:
                module._parameters[name] = nn.Parameter(parameter.detach().clone())
                return
            seen.add(id(parameter))
    raise CandidateError("no parameter of this model is shared")


def drift(program: Program, size: str) -> None:
    """Shrink a weight a little more at every step of the optimizer: 0.2 % at the first, 0.4 % at the second..."""
    module = modules_of(program.model, lambda _, m: isinstance(m, nn.Linear))[-1]
    axis = 0 if channel_dim(module) == -1 else 1
    done = {"steps": 0}

    def shrink(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        done["steps"] += 1
        with torch.no_grad():
            weight = module.weight
            weight.copy_(blend(size, weight, weight * (1 - 2e-3 * done["steps"]), axis))

    assert program.optimizer is not None
    program.undo.append(program.optimizer.register_step_post_hook(shrink).remove)
