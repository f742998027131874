"""A step graph as StableHLO, by the lowering of torch_tpu; nothing is compiled and nothing runs.

The lowering replays the graph in torch_tpu's deferred mode and asks for the program alone (`build_mlir`), so that
Mosaic kernels, which only a TPU's compiler takes, are no obstacle. Every operation is named `MODULE/NODE`: torch_tpu
takes locations from Python's stack, so each node runs in a frame that bears its name. The compiler keeps these names,
so its buffers find their modules again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from kernel_pytorch.backends.tpu.steps import StepGraph
from kernel_pytorch.errors import KptError

__all__ = ["LoweringError", "lower"]


class LoweringError(KptError):
    """The lowering has no rule for an operator; the message names it and the module it is in."""


def lower(step: StepGraph) -> bytes:
    """Return the step's program as StableHLO text with locations, its state donated.

    Needs torch_tpu, loaded on a TPU or on the CPU plugin.

    Raises:
        LoweringError: An operator has no lowering.
    """
    from torch_tpu._internal import execution_mode
    from torch_tpu._internal.compile import tpu_torch_compile as compiler

    graph = _on_device(step.graph)
    arguments = [compiler.placeholder(list(a.shape), a.dtype) for a in step.arguments]
    generator = torch.tpu.default_generators[0]  # type: ignore[attr-defined]
    exported = compiler.make_export_mode_device_generator(generator)
    compiler.set_export_mode_default_device_generator(exported)
    seed = compiler.get_device_state_tensor(exported)
    deferred = execution_mode.set_eager_mode(execution_mode.EagerMode._INTERNAL_COMPILE_FX_GRAPH)  # noqa: SLF001
    try:
        with deferred:
            results = _replay(graph, step, [a.clone() for a in arguments])
            after = compiler.get_device_state_tensor(exported)
            if after.data_ptr() != seed.data_ptr():
                arguments, results = [*arguments, seed], [*results, after]
            module = compiler.build_mlir(result_tensors=_distinct(results), argument_tensors=arguments)
    finally:
        compiler.clear_export_mode_default_device_generators()
    text = compiler.serialize_mlir_text(module, enable_debug_info=True)
    return _donate(_name(text, step), step).encode()


def _on_device(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a copy whose tensors are made on the TPU: what a model makes on the CPU is a constant of the program."""
    from torch_tpu._internal.compile import tpu_torch_compile as compiler

    copied = fx.GraphModule(graph, graph.graph)
    for node in copied.graph.nodes:
        if node.op == "get_attr" and isinstance(constant := getattr(graph, node.target, None), torch.Tensor):
            if isinstance(constant, FakeTensor):
                raise LoweringError(
                    f"the model keeps a tensor of shape {tuple(constant.shape)} that is no parameter and no buffer",
                    fix="register_buffer it",
                )
            setattr(copied, node.target, compiler.make_constant_tensor(constant.cpu()))
        if node.op == "call_function" and isinstance(node.kwargs.get("device"), torch.device):
            node.kwargs = {**node.kwargs, "device": torch.device("tpu", 0)}
    return copied


def _replay(graph: fx.GraphModule, step: StepGraph, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    replayed: list[torch.Tensor] = list(_Replay(graph, step).run(*arguments))
    return replayed


def _distinct(results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return results of which each has its own storage."""
    seen: set[int] = set()
    distinct = []
    for tensor in results:
        distinct.append(tensor.clone() if tensor.data_ptr() in seen else tensor)
        seen.add(tensor.data_ptr())
    return distinct


class _Replay(fx.Interpreter):
    """Runs each node from a frame that bears the node's name, for torch_tpu takes locations from there."""

    def __init__(self, graph: fx.GraphModule, step: StepGraph, within: str = "") -> None:
        super().__init__(graph)
        self._step = step
        self._frames = {node: _frame(within + node.name) for node in graph.graph.nodes}

    def run_node(self, n: fx.Node) -> Any:
        try:
            if n.target is torch.ops.higher_order.scan:
                make = self._loop(n, *self.fetch_args_kwargs_from_env(n)[0])
                return self._frames[n](lambda: make())  # noqa: PLW0108  torch_tpu takes no notice of lambdas' frames
            return self._frames[n](lambda: super(_Replay, self).run_node(n))
        except (RuntimeError, NotImplementedError, TypeError) as error:
            if n.op != "call_function":
                raise
            where = self._step.modules.get(n.name, "")
            raise LoweringError(
                f"{n.target} of {where or 'the step'} has no lowering to a TPU: {str(error).splitlines()[0]}"
            ) from error

    def _loop(
        self,
        node: fx.Node,
        body: fx.GraphModule,
        carry: Sequence[torch.Tensor],
        stacked: Sequence[torch.Tensor],
        shared: Sequence[torch.Tensor],
    ) -> Callable[[], Any]:
        """Return what records a loop over slices; torch_tpu's own lowering would compile the body for the host."""
        from torch_tpu._internal.compile import tpu_torch_compile as compiler
        from torch_tpu._internal.compile.scan import SCAN_REVERSE_ANNOTATION

        shapes = [*(t.shape for t in carry), *(t.shape[1:] for t in stacked), *(t.shape for t in shared)]
        kinds = [t.dtype for t in (*carry, *stacked, *shared)]
        arguments = [compiler.placeholder(list(shape), dtype) for shape, dtype in zip(shapes, kinds, strict=True)]
        results = list(_Replay(_on_device(body), self._step, f"{node.name}.").run(*(a.clone() for a in arguments)))
        module = compiler.build_mlir(result_tensors=_distinct(results), argument_tensors=arguments)
        noted = any((n.meta.get("custom") or {}).get(SCAN_REVERSE_ANNOTATION) for n in body.graph.nodes)
        stacks = [torch.empty((len(stacked[0]), *t.shape), dtype=t.dtype, device="meta") for t in results[len(carry) :]]
        return partial(
            compiler.create_scan_op,
            inits=list(carry),
            inputs=[*stacked, *shared],
            body_module=module,
            scan_direction=compiler.ScanDirection.kReverse if noted else compiler.ScanDirection.kForward,
            dummy_ys=stacks,
            num_scan_inputs=len(stacked),
        )


def _call(run: Callable[[], Any]) -> Any:
    return run()


def _frame(name: str) -> Callable[[Callable[[], Any]], Any]:
    return FunctionType(_call.__code__.replace(co_filename=_FRAME, co_name=name), {})


_FRAME = "kpt-step"
_FILE = re.compile(rf'^(#loc\d+) = loc\("{_FRAME}":\d+:\d+\)$', re.MULTILINE)
_NAMED = re.compile(r'^(#loc\d+) = loc\("([^"]*)"\((#loc\d+)\)\)$', re.MULTILINE)
_CALL = re.compile(r"^(#loc\d+) = loc\(callsite\((#loc\d+) at #loc\d+\)\)$", re.MULTILINE)


def _name(text: str, step: StepGraph) -> str:
    """Name each operation `MODULE/NODE` after the frame it was made in, and the program `kpt_step`."""
    files = {match[1] for match in _FILE.finditer(text)}
    frames = {match[1]: match[2] for match in _NAMED.finditer(text) if match[3] in files}
    calls = {match[1]: frames[match[2]] for match in _CALL.finditer(text) if match[2] in frames}

    def renamed(match: re.Match[str]) -> str:
        node = calls.get(match[3])
        if node is None:
            return match[0]
        return f'{match[1]} = loc("{step.modules.get(node) or "step"}/{node}"({match[3]}))'

    return re.sub(r'^module @("[^"]*"|\S+)', "module @kpt_step", _NAMED.sub(renamed, text), count=1, flags=re.MULTILINE)


def _donate(text: str, step: StepGraph) -> str:
    """Say of each argument that the step replaces which result takes its memory."""
    head, opening, tail = text.partition("@main(")
    signature, arrow, rest = tail.partition("->")
    outputs = {f"%arg{i}": argument.output for i, argument in enumerate(step.arguments)}

    def donated(match: re.Match[str]) -> str:
        output = outputs.get(match[1])
        if output is None:
            return match[0]
        return f"{match[1]}: {match[2]} {{tf.aliasing_output = {output} : i32" + (", " if match[3] else "}")

    return head + opening + _ARGUMENT.sub(donated, signature) + arrow + rest


_ARGUMENT = re.compile(r"(%arg\d+): (tensor<[^>]*>)( \{)?")
