"""A whole training step, or a forward, of a plain PyTorch program as one graph; nothing is executed.

Forward, backward and the user's own optimizer run on fake tensors of the device (shapes and dtypes without memory)
while `make_fx` records the aten operators. In-place updates are made functional as AOTAutograd does it, so that what
the step changes are results of the graph: new parameters, buffers and optimizer state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from kernel_pytorch.backends.tpu.flops import count_flops
from kernel_pytorch.backends.tpu.naming import Naming
from kernel_pytorch.core.program import model_loss, plain_call
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import Mode
from kernel_pytorch.core.workload import as_call
from kernel_pytorch.errors import KptError

__all__ = ["Argument", "Role", "StepGraph", "TraceError", "trace_step"]


class TraceError(KptError):
    """A program cannot be written down as one graph; the message names the reason, and the module where known."""


class Role(StrEnum):
    """What an argument of a step is."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    OPTIMIZER = "optimizer"
    BATCH = "batch"


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of the graph.

    Attributes:
        name: `model.layers.0.weight`; for optimizer state `model.layers.0.weight.exp_avg`; `batch.0` for inputs.
        donated: Whether the step replaces it, so that its memory may hold the new value.
        output: Position of the result that replaces it; `None` where nothing does.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    dtype: torch.dtype
    donated: bool = False
    output: int | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the dense tensor, without padding."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(slots=True)
class StepGraph:
    """A step as one functional graph.

    Attributes:
        graph: Placeholders in the order of `arguments`; its outputs are the new values of what the step changes, in the
            order of the arguments, then the loss (training) or the output's tensors (inference).
        arguments: What the graph takes.
        flops: Floating-point operations by PyTorch's own formulas (a multiply-add is two), after dead code is removed.
        flops_by_operator: The same by operator, e.g. `aten.mm`.
        modules: Where each node comes from, by its name: `layers.0.attention`, with ` (backward)` for gradients.
    """

    graph: fx.GraphModule
    arguments: tuple[Argument, ...]
    flops: int
    flops_by_operator: Mapping[str, int] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)

    @property
    def state_bytes(self) -> int:
        """Bytes of parameters, buffers and optimizer state, without padding."""
        return sum(a.bytes for a in self.arguments if a.role is not Role.BATCH)


def trace_step(program: Program, batch: Any, *, device: str = "tpu") -> StepGraph:
    """Record one step of a program as a graph.

    Args:
        program: Model, loss and optimizer (training) or the model alone (inference); parameters and buffers may lie on
            `meta`. Left as it was.
        batch: What the loss takes, or the inputs of one call; only shapes and dtypes of tensors count.
        device: The device that operators are recorded for; `tpu` needs torch_tpu to be loaded.

    Raises:
        TraceError: The step cannot be one graph: control flow on values, an optimizer that needs a closure, ...
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    place = torch.device(device)
    with _compiling(), mode, place:
        state = _State.of(program, mode, place)
        leaves, spec = pytree.tree_flatten(batch)
        inputs = [_fake(leaf, place) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        tensors = [i for i, leaf in enumerate(inputs) if isinstance(leaf, torch.Tensor)]
        naming = Naming(program.model)

        def step(*flat: torch.Tensor) -> list[torch.Tensor]:
            held, fed = flat[: len(state.tensors)], flat[len(state.tensors) :]
            values = list(inputs)
            for i, tensor in zip(tensors, fed, strict=True):
                values[i] = tensor
            with state.replaced_by(held), naming:
                results = _run(program, pytree.tree_unflatten(values, spec), state, held, naming)
            return [*held, *results]

        arguments = [*state.tensors, *(inputs[i] for i in tensors)]
        graph = _record(step, arguments, naming)
    names = [*state.names, *(f"batch.{i}" for i in tensors)]
    roles = [*state.roles, *(Role.BATCH for _ in tensors)]
    return _finish(graph, names, roles, arguments)


def _run(
    program: Program, batch: Any, state: _State, held: Sequence[torch.Tensor], naming: Naming
) -> list[torch.Tensor]:
    if program.mode is not Mode.TRAINING:
        call = as_call(batch)
        with torch.no_grad():
            output = program.model(*call.args, **call.kwargs)
        return [leaf for leaf in pytree.tree_leaves(_plain(output)) if isinstance(leaf, torch.Tensor)]
    loss = program.step_loss(model_loss)(program.model, batch)
    naming.before_backward(loss)
    trainable = [t for t in held[: state.parameters] if t.requires_grad]
    gradients = torch.autograd.grad(loss.reshape(()), trainable, allow_unused=True)
    for tensor, gradient in zip(trainable, gradients, strict=True):
        tensor.grad = gradient
    if program.optimizer is not None:
        naming.before_optimizer(type(program.optimizer).__name__)
        with state.optimizing(held):
            program.optimizer.step()
    for tensor in trainable:
        tensor.grad = None
    return [loss.detach()]


def _plain(output: Any) -> Any:
    """Return a tree that pytree reads: a model's output class is a mapping or a dataclass that it may not know."""
    if isinstance(output, Mapping):
        return dict(output)
    return output


def _fake(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Let optimizers and models know that values are unknown, as `torch.export` does."""
    before = torch.compiler._is_compiling_flag  # noqa: SLF001
    torch.compiler._is_compiling_flag = True  # noqa: SLF001
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before  # noqa: SLF001


@dataclass(slots=True)
class _State:
    """What a step holds between steps, as fake tensors: parameters, buffers, optimizer state."""

    program: Program
    names: list[str]
    roles: list[Role]
    tensors: list[torch.Tensor]
    requires_grad: list[bool]
    places: list[list[tuple[nn.Module, str]]]
    parameters: int
    slots: list[tuple[int, str]] = field(default_factory=list)

    @classmethod
    def of(cls, program: Program, mode: FakeTensorMode, device: torch.device) -> _State:
        del mode
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
                    state.tensors.append(_fake(tensor, device))
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
            for i in dict.fromkeys(i for group in groups for i in group):
                for key, value in optimizer.state.get(held[i], {}).items():
                    if isinstance(value, torch.Tensor):
                        self.slots.append((i, key))
                        self.names.append(f"{self.names[i]}.{key}")
                        self.roles.append(Role.OPTIMIZER)
                        self.tensors.append(_fake(value, self.tensors[0].device))
                        self.requires_grad.append(False)
                        self.places.append([])
                    elif not isinstance(value, int | float | bool | type(None)):
                        raise TraceError(
                            f"{type(optimizer).__name__} keeps {key!r}, a {type(value).__name__}, for each parameter; "
                            "only tensors and numbers can be arguments of a graph"
                        )
                    else:
                        self._numbers.setdefault(i, {})[key] = value

    _groups: list[list[int]] = field(default_factory=list)
    _numbers: dict[int, dict[str, Any]] = field(default_factory=dict)

    @contextlib.contextmanager
    def replaced_by(self, held: Sequence[torch.Tensor]) -> Iterator[None]:
        """Put tensors in the place of parameters and buffers, and the program's call in that of the model's."""
        model = self.program.model
        before: list[tuple[dict[str, Any], str, Any]] = []
        compiled = model._compiled_call_impl  # noqa: SLF001
        try:
            for tensor, wants, places in zip(held, self.requires_grad, self.places, strict=False):
                if wants:
                    tensor.requires_grad_()
                for module, key in places:
                    parameters: dict[str, Any] = module._parameters  # noqa: SLF001
                    members = parameters if key in parameters else module._buffers  # noqa: SLF001
                    before.append((members, key, members[key]))
                    members[key] = tensor
            if self.program.call != plain_call(model):
                model._compiled_call_impl = self.program.call  # noqa: SLF001
            yield
        finally:
            model._compiled_call_impl = compiled  # noqa: SLF001
            for members, key, value in reversed(before):
                members[key] = value

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
            optimizer.state[held[i]].update(numbers)
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


_PLAIN_GROUP = {"foreach": False, "fused": False, "capturable": True}
"""One operator a tensor, and step counts that stay on the device."""


def _record(step: Callable[..., Any], arguments: Sequence[torch.Tensor], naming: Naming) -> fx.GraphModule:
    from torch._functorch._aot_autograd.functional_utils import from_fun, sync_functional_tensor, to_fun
    from torch._subclasses.functional_tensor import FunctionalTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    def functional(*flat: torch.Tensor) -> list[Any]:
        with FunctionalTensorMode():
            results = step(*(to_fun(t) for t in flat))
            for tensor in results:
                sync_functional_tensor(tensor)
            return [from_fun(t) for t in results]

    with torch.fx.traceback.preserve_node_meta(), naming.recording():
        graph: fx.GraphModule = make_fx(functional)(*arguments)
    return graph


def _finish(
    graph: fx.GraphModule, names: Sequence[str], roles: Sequence[Role], tensors: Sequence[torch.Tensor]
) -> StepGraph:
    """Drop what nothing uses, and outputs that are arguments passed through."""
    placeholders = list(graph.graph.find_nodes(op="placeholder"))
    (out,) = graph.graph.find_nodes(op="output")
    values = list(out.args[0])
    held = [i for i, role in enumerate(roles) if role is not Role.BATCH]
    state, results = values[: len(held)], values[len(held) :]
    changed = {i: value for i, value in zip(held, state, strict=True) if value is not placeholders[i]}
    out.args = ([*changed.values(), *results],)
    for node in reversed(graph.graph.nodes):
        if node.op == "call_function" and str(node.target).startswith("profiler."):  # a label around the optimizer
            node.users.clear()
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    position = {i: k for k, i in enumerate(changed)}
    arguments = []
    for i, (node, tensor) in enumerate(zip(placeholders, tensors, strict=True)):
        if not node.users:
            graph.graph.erase_node(node)
            continue
        where = position.get(i)
        arguments.append(
            Argument(names[i], roles[i], tuple(tensor.shape), tensor.dtype, donated=where is not None, output=where)
        )
    graph.recompile()
    by_operator = count_flops(graph)
    modules = {node.name: Naming.of(node) for node in graph.graph.nodes if node.op == "call_function"}
    return StepGraph(graph, tuple(arguments), sum(by_operator.values()), by_operator, modules)
