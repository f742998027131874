"""A whole training step, or a forward, of a plain PyTorch program as one graph; nothing is executed.

Forward, backward and the user's own optimizer run on fake tensors of the device (shapes and dtypes without memory)
while `make_fx` records the aten operators. In-place updates are made functional as AOTAutograd does it, so that what
the step changes are results of the graph: new parameters, buffers and optimizer state.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree

from kernel_pytorch.backends.tpu.flops import count_flops
from kernel_pytorch.backends.tpu.naming import Naming
from kernel_pytorch.backends.tpu.state import Role, State, TraceError, fake
from kernel_pytorch.core.program import model_loss
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import Mode
from kernel_pytorch.core.workload import as_call, as_tree

__all__ = ["Argument", "Role", "StepGraph", "TraceError", "trace_step"]

aten = torch.ops.aten


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
        modules: Where each node comes from, by its name: `layers.0.attention`, with ` (backward)` for gradients; those
            of a loop's body are named `LOOP.NODE`.
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
        state = State.of(program, place)
        tree, close = as_tree(batch)
        leaves, spec = pytree.tree_flatten(tree)
        inputs = [fake(leaf, place) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        tensors = [i for i, leaf in enumerate(inputs) if isinstance(leaf, torch.Tensor)]
        naming = Naming(program.model)

        def step(*flat: torch.Tensor) -> list[torch.Tensor]:
            held, fed = flat[: len(state.tensors)], flat[len(state.tensors) :]
            values = list(inputs)
            for i, tensor in zip(tensors, fed, strict=True):
                values[i] = tensor
            with state.replaced_by(held), naming:
                results = _run(program, close(pytree.tree_unflatten(values, spec)), state, held, naming)
            return [*held, *results]

        arguments = [*state.tensors, *(inputs[i] for i in tensors)]
        try:
            graph = _record(step, arguments, naming)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise _depends_on_values(error, naming) from error
    names = [*state.names, *(f"batch.{i}" for i in tensors)]
    roles = [*state.roles, *(Role.BATCH for _ in tensors)]
    return _finish(graph, names, roles, arguments)


def _depends_on_values(error: DataDependentOutputException | DynamicOutputShapeException, naming: Naming) -> TraceError:
    where = naming.failed or naming.current
    if isinstance(error, DynamicOutputShapeException):
        return TraceError(
            f"the shape of what {error.func} in {where} returns depends on values, and a step has fixed shapes",
            fix="mask instead of selecting (torch.where), or pad to a few lengths (buckets), one program each",
        )
    return TraceError(
        f"{where} reads a value on the host ({error.func}): what it does then depends on values, so it is no one graph",
        fix="keep the decision in tensors (torch.where), or make it an argument of the model",
    )


def _run(
    program: Program, batch: Any, state: State, held: Sequence[torch.Tensor], naming: Naming
) -> list[torch.Tensor]:
    if program.mode is not Mode.TRAINING:
        call = as_call(batch)
        with torch.no_grad():
            output = program.model(*call.args, **call.kwargs)
        return [leaf for leaf in pytree.tree_leaves(_plain(output)) if isinstance(leaf, torch.Tensor)]
    loss = program.step_loss(model_loss)(program.model, batch)
    if not loss.requires_grad:
        raise TraceError(
            "the loss depends on no parameter that requires a gradient, or on none through a traced operator"
        )
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
        return {key: _plain(value) for key, value in output.items()}
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [_plain(getattr(output, part.name)) for part in dataclasses.fields(output)]
    return output


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Let optimizers and models know that values are unknown, as `torch.export` does."""
    before = torch.compiler._is_compiling_flag  # noqa: SLF001
    torch.compiler._is_compiling_flag = True  # noqa: SLF001
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before  # noqa: SLF001


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
        graph: fx.GraphModule = make_fx(functional, decomposition_table=_DECOMPOSED)(*arguments)
    return graph


_DECOMPOSED = {
    aten._weight_norm_interface_backward.default: aten._weight_norm_differentiable_backward.default  # noqa: SLF001
}
"""Operators without a lowering, and what computes the same by operators that have one."""


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
    modules = dict(_modules(graph))
    return StepGraph(graph, tuple(arguments), sum(by_operator.values()), by_operator, modules)


def _modules(graph: fx.GraphModule, within: str = "") -> Iterator[tuple[str, str]]:
    """Yield the name of each operator and where it is from; those of the body of a loop `scan` are `scan.NAME`."""
    for node in graph.graph.nodes:
        if node.op == "call_function":
            yield within + node.name, Naming.of(node)
        if node.target is torch.ops.higher_order.scan:
            yield from _modules(getattr(graph, str(node.args[0].target)), f"{node.name}.")
