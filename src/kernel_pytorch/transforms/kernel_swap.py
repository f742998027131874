"""Run normalisations and gated MLPs on this package's kernels: the modules stay, their `forward` is another.

A module is matched by what it computes: it is run on random inputs beside the definition, with every order of casts
that models use, and swapped only where the two agree. Which code a swapped `forward` runs depends on its input: on a
GPU in bfloat16, float16 or float32 the kernel; in fp64 and on the CPU the definition, so the structure gate judges the
same formula; norms whose input and weight differ in dtype, or are narrow under autocast, run the module's own code.

`forward` is set on the instance, for Dynamo does not look into the slot of `nn.Module.compile` of an inner module.
Pickling drops it; `copy.deepcopy` binds it to the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.ops.gated_mlp import gated_mlp
from kernel_pytorch.ops.gated_mlp.matching import agree, gated_mlp_options
from kernel_pytorch.ops.gated_mlp.reference import gated_mlp_reference
from kernel_pytorch.ops.layer_norm import layer_norm
from kernel_pytorch.ops.layer_norm.reference import layer_norm_reference
from kernel_pytorch.ops.rms_norm import rms_norm
from kernel_pytorch.ops.rms_norm.matching import rms_norm_options
from kernel_pytorch.ops.rms_norm.reference import rms_norm_reference
from kernel_pytorch.transforms.ceilings import FUSIBLE, bounded
from kernel_pytorch.transforms.plain_source import plain_source

__all__ = ["KernelSwap", "gated_mlp_options", "layer_norm_options", "rms_norm_options"]


def layer_norm_options(module: nn.Module, norm: Callable[..., Any]) -> dict[str, Any] | None:
    """Return `eps` of a plain `nn.LayerNorm` over the last dimension with a weight."""
    del norm
    plain = type(module) is nn.LayerNorm and len(module.normalized_shape) == 1
    return {"eps": float(module.eps)} if plain and module.weight is not None else None  # type: ignore[arg-type]


def fused_forward(
    module: nn.Module, op: str, options: dict[str, Any], kernel: Callable[..., Any]
) -> Callable[..., Any]:
    """Return another `forward` of the module: the fused operation where dtypes are one, else the module's own."""
    import types

    plain = type(module).forward
    if op == "gated_mlp":
        gate_name, up_name, down_name = options["names"]
        activation = options["activation"]

        def forward(self: Any, x: torch.Tensor) -> Any:
            gate, up = getattr(self, gate_name)(x), getattr(self, up_name)(x)
            return getattr(self, down_name)(kernel(gate, up, activation))

    elif op == "layer_norm":
        eps = options["eps"]

        def forward(self: Any, x: torch.Tensor) -> Any:
            # Under autocast PyTorch's own norms compute in float32 and return it.
            narrow = x.dtype != torch.float32 and torch.is_autocast_enabled(x.device.type)
            mixed = x.dtype != self.weight.dtype or narrow
            return plain(self, x) if mixed else kernel(x, self.weight, self.bias, eps)

    else:

        def forward(self: Any, x: torch.Tensor) -> Any:
            # Under autocast PyTorch's own norms compute in float32 and return it.
            narrow = x.dtype != torch.float32 and torch.is_autocast_enabled(x.device.type)
            mixed = x.dtype != self.weight.dtype or narrow
            return plain(self, x) if mixed else kernel(x, self.weight, **options)

    return types.MethodType(forward, module)


def swap_forwards(
    model: nn.Module, op: str, matches: Callable[..., Any], kernel: Callable[..., Any]
) -> list[nn.Module]:
    """Give each module that `kernel` can compute a fused `forward`, and return these modules."""
    swapped = []
    for module in model.modules():
        if "forward" not in vars(module):
            options = matches(module, kernel)
            if options is not None:
                module.forward = fused_forward(module, op, options, kernel)
                swapped.append(module)
    return swapped


_OPS: Mapping[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "rms_norm": (rms_norm_options, rms_norm, rms_norm_reference),
    "layer_norm": (layer_norm_options, layer_norm, layer_norm_reference),
    "gated_mlp": (gated_mlp_options, gated_mlp, gated_mlp_reference),
}
_TOLD_BY: Mapping[str, tuple[str, ...]] = {
    "rms_norm": ("rmsnorm", "t5layernorm"),
    "layer_norm": ("layernorm",),
    "gated_mlp": ("mlp", "feedforward"),
}


class KernelSwap:
    """`op=rms_norm|layer_norm|gated_mlp`, or `op=all` for each of them that the model has."""

    name = "kernel_swap"
    summary = "run normalisations and gated MLPs on fused Triton kernels"
    group = "kernels"
    numerics = Numerics.REORDERED
    modes = frozenset({Mode.INFERENCE, Mode.TRAINING})
    compiles = False
    compile_fuses = True

    def probe(self, device: DeviceSpec) -> Skip | None:
        """The kernels are written in Triton, for NVIDIA and AMD GPUs."""
        if device.vendor in ("nvidia", "amd") and "triton" in device.features:
            return None
        return Skip("the kernels need an NVIDIA or AMD GPU that Triton supports")

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """Everything first, then each operation alone; by class names, for `apply` looks at the modules."""
        skip = self.probe(device)
        if skip is not None:
            return skip
        classes = [name.lower() for name in workload.modules]
        ops = [op for op, words in _TOLD_BY.items() if any(word in name for word in words for name in classes)]
        if not ops:
            return Skip("the model has no module that looks like an RMSNorm, a LayerNorm or an MLP")
        return [Step(self.name, {"op": op}) for op in (["all", *ops] if len(ops) > 1 else ops)]

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """All that is not a product or attention may vanish, for it is what the kernels fuse."""
        del step, device
        return bounded(prediction, dict.fromkeys(FUSIBLE, 0.0))

    def apply(self, program: Program, step: Step) -> Program:
        """Swap what matches; `undo` gives the modules their own `forward` back."""
        counts = {}
        for op in _wanted(step):
            matches, kernel, _ = _OPS[op]
            modules = swap_forwards(program.model, op, matches, kernel)
            program.undo.append(lambda modules=modules: _restore_forwards(modules))  # type: ignore[misc]
            counts[op] = len(modules)
        if not any(counts.values()):
            raise CandidateError(f"{step}: no module of this model computes it")
        program.notes.append("kernels: " + ", ".join(f"{n} x {op}" for op, n in counts.items() if n))
        return program

    def source(self, step: Step) -> str:
        """The same swap, with `torch.compile` of each definition in place of the kernel."""
        ops = _wanted(step)
        functions: list[Callable[..., Any]] = [agree, fused_forward, swap_forwards]
        then = "# Plain PyTorch has no such kernels: torch.compile makes one of each definition.\n"
        for op in ops:
            matches, _, definition = _OPS[op]
            functions += [matches, definition]
            first = "" if op == "gated_mlp" else "[0]"
            then += f"def {op}(*args, **kwargs):\n    return {definition.__name__}(*args, **kwargs){first}\n\n"
            then += f"swap_forwards(model, {op!r}, {matches.__name__}, torch.compile({op}, dynamic=True))\n"
        return plain_source(*functions, then=then)


def _wanted(step: Step) -> list[str]:
    op = str(step.params.get("op", ""))
    if op == "all":
        return list(_OPS)
    if op not in _OPS:
        raise CandidateError(f"unknown operation {op!r}; expected all, {', '.join(_OPS)}")
    return [op]


def _restore_forwards(modules: list[nn.Module]) -> None:
    for module in modules:
        vars(module).pop("forward", None)
