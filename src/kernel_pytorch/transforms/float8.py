"""Train linear layers in FP8 (`precision`): the modules stay, their `forward` is another.

Pickling drops it; `copy.deepcopy` binds it to the copy, whose scales then move apart from the original's.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

from torch import nn

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.ops.gated_mlp.reference import gated_mlp_reference
from kernel_pytorch.precision.eligible import verdicts
from kernel_pytorch.precision.emulate import emulate_linear
from kernel_pytorch.precision.linear import restore_linear, swap_linears
from kernel_pytorch.precision.mlp import fusible, restore_mlp, swap_mlp
from kernel_pytorch.precision.observe import alike, observe
from kernel_pytorch.precision.recipes import RECIPES, holds_tails
from kernel_pytorch.transforms.ceilings import bounded, roofline
from kernel_pytorch.transforms.kernel_swap import gated_mlp_options

__all__ = ["Float8"]

_MLP = tuple[nn.Module, tuple[nn.Linear, nn.Linear, nn.Linear], str]


class Float8:
    """`recipe=NAME` for the linear layers that FP8 is for; with `head=True` also for the one that makes logits.

    The gradient of logits is scaled as a whole: its format is E5M2, whose range holds both the one word that counts and
    the tail of the others (a factor of the number of words apart), where E4M3 would round the tail to zero. A search
    proposes it where the configuration allows it (`nvidia.allow_float8_lm_head`).
    """

    name = "float8"
    summary = "train linear layers in FP8"
    group = "float8"
    numerics = Numerics.LOWER_PRECISION
    modes = frozenset({Mode.TRAINING})
    compiles = False

    def probe(self, device: DeviceSpec) -> Skip | None:
        """Tensor cores with FP8 are needed: Ada, Hopper and newer of NVIDIA."""
        if device.vendor != "nvidia":
            return Skip(f"products of FP8 are written for NVIDIA GPUs; on {device.vendor} they are only emulated")
        if "fp8" not in device.features:
            return Skip("the GPU has no tensor cores for FP8 (needs Ada, Hopper or newer)")
        return None

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """Each recipe, what costs the fewest passes over memory first."""
        skip = self.probe(device)
        if skip is not None:
            return skip
        if "Linear" not in workload.modules:
            return Skip("the model has no nn.Linear")
        with_head = [Step(self.name, {"recipe": name, "head": True}) for name in RECIPES if holds_tails(name)]
        return with_head + [Step(self.name, {"recipe": name}) for name in RECIPES]

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """Products may run at the peak rate of FP8."""
        del step
        shares = [s for s in prediction.shares if s.kind == "matmul"]
        left = {s.kind: roofline(s, prediction, device, "float8_e4m3fn") for s in shares}
        return bounded(prediction, left)

    def apply(self, program: Program, step: Step) -> Program:
        """Swap the `forward` of the layers; `undo` takes it back.

        Raises:
            CandidateError: No layer of the model is one for FP8, with the reasons.
        """
        recipe = str(step.params.get("recipe", ""))
        if recipe not in RECIPES:
            raise CandidateError(f"{step}: recipe must be one of {', '.join(RECIPES)}")
        head = bool(step.params.get("head", False))
        if head and not holds_tails(recipe):
            raise CandidateError(f"{step}: gradients of logits need e5m2, and {recipe} has another format")
        found = list(verdicts(program.model, allow_head=head))
        chosen = [v.layer for v in found if not v.reason]
        if not chosen:
            raise CandidateError(f"{step}: no linear layer is one for FP8: {_reasons([v.reason for v in found])}")
        mlps = _gated_mlps(program.model, chosen, recipe)
        shared = _sharing(program, [m for m in chosen if all(m not in layers for _, layers, _ in mlps)])
        for module, layers, activation in mlps:
            swap_mlp(module, layers, activation, recipe)
        for group in shared:
            swap_linears(group, recipe)
        program.undo.append(lambda: _restore(chosen, [module for module, _, _ in mlps]))
        program.notes.append(
            f"FP8 ({recipe}): {len(chosen)} of {len(found)} linear layers, as {len(mlps)} gated MLPs and {len(shared)} "
            "groups that read one tensor"
        )
        left = [v.reason for v in found if v.reason]
        if left:
            program.notes.append(f"linear layers that keep their format: {_reasons(left)}")
        return program

    def emulate(self, model: nn.Module, step: Step) -> nn.Module:
        """Let a model round its operands as the step does, in plain PyTorch and its own precision, and return it.

        What that costs is what a faithful implementation may cost.
        """
        for verdict in verdicts(model, allow_head=bool(step.params.get("head", False))):
            if not verdict.reason:
                emulate_linear(verdict.layer, str(step.params["recipe"]))
        return model

    def source(self, step: Step) -> str:
        """It has none: the casts are Triton code of this package.

        Raises:
            CandidateError: Always.
        """
        raise CandidateError(
            f"{step} cannot be written as plain PyTorch: its kernels are part of kernel_pytorch",
            fix="keep using the plan with kernel_pytorch, or optimise without float8",
        )


def _gated_mlps(model: nn.Module, chosen: list[nn.Linear], recipe: str) -> list[_MLP]:
    """Return the modules that compute a gated MLP of layers for FP8, seen by running them beside the definition."""
    allowed = {id(m) for m in chosen}
    found: list[_MLP] = []
    for module in model.modules():
        options = None if "forward" in vars(module) else gated_mlp_options(module, gated_mlp_reference)
        if options is not None:
            gate, up, down = (getattr(module, name) for name in options["names"])
            layers = (gate, up, down)
            if all(id(m) in allowed for m in layers) and fusible(recipe, layers):
                found.append((module, layers, options["activation"]))
    return found


def _sharing(program: Program, layers: list[nn.Linear]) -> list[list[nn.Linear]]:
    """Return the layers, those together that read the same tensor; each alone where the model could not be watched."""
    call = next(iter(program.calls.values()), None)
    seen = None if call is None else observe(program.call, call, layers)
    if seen is None:
        program.notes.append(
            "FP8: the model did not run on a part of its inputs, so no layers share their input's cast"
        )
    groups = [] if seen is None else [g for g in seen.groups if alike(g)]
    taken = {id(m) for g in groups for m in g}
    return groups + [[m] for m in layers if id(m) not in taken]


def _reasons(reasons: list[str]) -> str:
    counted = collections.Counter(reasons)
    return "; ".join(f"{n} x {reason}" for reason, n in counted.most_common()) or "there is none"


def _restore(layers: list[nn.Linear], mlps: list[nn.Module]) -> None:
    for module in mlps:
        restore_mlp(module)
    for layer in layers:
        restore_linear(layer)
