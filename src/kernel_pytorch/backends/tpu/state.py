"""What a training step holds from one to the next, as arguments of a graph: parameters, buffers, optimizer state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from kernel_pytorch.core.program import plain_call
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import Mode
from kernel_pytorch.errors import KptError

__all__ = ["Role", "State", "TraceError", "fake"]


class TraceError(KptError):
    """A program cannot be written down as one graph; the message names the reason, and the module where known."""


class Role(StrEnum):
    """What an argument of a step is."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    OPTIMIZER = "optimizer"
    BATCH = "batch"


def fake(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor like another on a device; under a fake mode it has no memory."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


@dataclass(slots=True)
class State:
    """What a step holds between steps, as fake tensors: parameters, buffers, optimizer state.

    Attributes:
        names: Of each tensor, the parameter's own name before that of its optimizer state.
        requires_grad: Whether a tensor is trained.
        places: Where the model has it; several where it is tied.
        parameters: How many of the tensors are parameters; they come first.
        slots: Of optimizer state, in order: index of its parameter, and its key.
    """

    program: Program
    names: list[str]
    roles: list[Role]
    tensors: list[torch.Tensor]
    requires_grad: list[bool]
    places: list[list[tuple[nn.Module, str]]]
    parameters: int
    slots: list[tuple[int, str]] = field(default_factory=list)

    @classmethod
    def of(cls, program: Program, device: torch.device) -> State:
        """Return the state of a program on a device, with the state that its optimizer will have.

        Raises:
            TraceError: The optimizer cannot be part of a graph.
        """
        found: dict[int, int] = {}
        state = cls(program, [], [], [], [], [], 0)
        for role in (Role.PARAMETER, Role.BUFFER):
            for path, module in program.model.named_modules(remove_duplicate=False):
                members = module._parameters if role is Role.PARAMETER else module._buffers  # noqa: SLF001
                for key, tensor in members.items():
                    if tensor is None:
                        continue
                    if id(tensor) in found:
                        state.places[found[id(tensor)]].append((module, key))
                        continue
                    found[id(tensor)] = len(state.tensors)
                    state.names.append(f"{path}.{key}" if path else key)
                    state.roles.append(role)
                    state.tensors.append(fake(tensor, device))
                    trained = role is Role.PARAMETER and program.mode is Mode.TRAINING
                    state.requires_grad.append(trained and tensor.requires_grad)
                    state.places.append([(module, key)])
            if role is Role.PARAMETER:
                state.parameters = len(state.tensors)
        if program.optimizer is not None and program.mode is Mode.TRAINING:
            state._add_optimizer(found)
        return state

    def _add_optimizer(self, found: Mapping[int, int]) -> None:
        """Take one step with made-up gradients, so that the optimizer makes its state; then it is a step's argument."""
        optimizer = self.program.optimizer
        assert optimizer is not None
        groups = [[found.get(id(p), -1) for p in group["params"]] for group in optimizer.param_groups]
        if any(i < 0 for group in groups for i in group):
            raise TraceError("the optimizer holds a parameter that is not the model's")
        self._groups = groups
        held = [t.detach() for t in self.tensors]
        for i in {i for group in groups for i in group}:
            held[i].grad = torch.empty_like(held[i])
        with self.optimizing(held):
            try:
                optimizer.step()
            except TypeError as error:
                raise TraceError(f"{type(optimizer).__name__} cannot be stepped: {error}") from error
            except DataDependentOutputException as error:
                raise TraceError(
                    f"optimizer {type(optimizer).__name__} reads a value on the host ({error.func}), so a step is no "
                    "one graph",
                    fix="an optimizer with `capturable`, e.g. torch.optim.AdamW",
                ) from error
            for i in dict.fromkeys(i for group in groups for i in group):
                for key, value in optimizer.state.get(held[i], {}).items():
                    if isinstance(value, torch.Tensor) and value.dim() == 0 and not self._on_device:
                        self._numbers.setdefault(i, {})[key] = _HostScalar(value.dtype)
                    elif isinstance(value, torch.Tensor):
                        self.slots.append((i, key))
                        self.names.append(f"{self.names[i]}.{key}")
                        self.roles.append(Role.OPTIMIZER)
                        self.tensors.append(fake(value, self.tensors[0].device))
                        self.requires_grad.append(False)
                        self.places.append([])
                    elif not isinstance(value, int | float | bool | type(None)):
                        raise TraceError(
                            f"{type(optimizer).__name__} keeps {key!r}, a {type(value).__name__}, for each parameter; "
                            "only tensors and numbers can be arguments of a graph"
                        )
                    else:
                        self._numbers.setdefault(i, {})[key] = value

    @property
    def _on_device(self) -> bool:
        """Whether the optimizer can keep its counts on the device."""
        assert self.program.optimizer is not None
        return all("capturable" in group for group in self.program.optimizer.param_groups)

    _groups: list[list[int]] = field(default_factory=list)
    _numbers: dict[int, dict[str, Any]] = field(default_factory=dict)

    @contextlib.contextmanager
    def replaced_by(self, held: Sequence[torch.Tensor]) -> Iterator[None]:
        """Put tensors in the place of parameters and buffers, and the program's call in that of the model's."""
        model = self.program.model
        before: list[tuple[dict[str, Any], str, Any]] = []
        compiled = model._compiled_call_impl  # noqa: SLF001
        # Recurrent modules hand their kernels a list of weights that they made when these were set.
        recurrent = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
        lists = [m._flat_weights for m in recurrent]  # noqa: SLF001
        try:
            for tensor, wants, places in zip(held, self.requires_grad, self.places, strict=False):
                if wants:
                    tensor.requires_grad_()
                for module, key in places:
                    parameters: dict[str, Any] = module._parameters  # noqa: SLF001
                    members = parameters if key in parameters else module._buffers  # noqa: SLF001
                    before.append((members, key, members[key]))
                    members[key] = tensor
            for layer in recurrent:
                layer._flat_weights = [getattr(layer, name, None) for name in layer._flat_weights_names]  # noqa: SLF001
            if self.program.call != plain_call(model):
                model._compiled_call_impl = self.program.call  # noqa: SLF001
            yield
        finally:
            model._compiled_call_impl = compiled  # noqa: SLF001
            for members, key, value in reversed(before):
                members[key] = value
            for layer, weights in zip(recurrent, lists, strict=True):
                layer._flat_weights = weights  # noqa: SLF001

    @contextlib.contextmanager
    def optimizing(self, held: Sequence[torch.Tensor]) -> Iterator[None]:
        """Give the optimizer these tensors as parameters and state, one tensor at a time and without host reads."""
        optimizer = self.program.optimizer
        assert optimizer is not None
        before = [dict(group) for group in optimizer.param_groups]
        state = optimizer.state
        optimizer.state = type(state)(dict)
        first = len(held) - len(self.slots)
        for (i, key), tensor in zip(self.slots, held[first:], strict=True):
            optimizer.state[held[i]][key] = tensor
        for i, numbers in self._numbers.items():
            made = {k: v.tensor() if isinstance(v, _HostScalar) else v for k, v in numbers.items()}
            optimizer.state[held[i]].update(made)
        try:
            for group, members in zip(optimizer.param_groups, self._groups, strict=True):
                group["params"] = [held[i] for i in members]
                group.update({key: value for key, value in _PLAIN_GROUP.items() if key in group})
            yield
        finally:
            optimizer.state = state
            for group, saved in zip(optimizer.param_groups, before, strict=True):
                group.clear()
                group.update(saved)


@dataclass(frozen=True, slots=True)
class _HostScalar:
    """A count that an optimizer without `capturable` reads on the host: a constant of the graph, that of step two."""

    dtype: torch.dtype

    def tensor(self) -> torch.Tensor:
        return torch.tensor(1.0, dtype=self.dtype, device="cpu")


_PLAIN_GROUP = {"foreach": False, "fused": False, "capturable": True}
"""One operator a tensor, and step counts that stay on the device."""
