"""Train linear layers in FP8 (`precision`): the modules stay, their `forward` is another.

Pickling drops it; `copy.deepcopy` binds it to the copy, whose scales then move apart from the original's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.precision.convert import swap_model, undo
from kernel_pytorch.precision.eligible import verdicts
from kernel_pytorch.precision.emulate import emulate_linear
from kernel_pytorch.precision.recipes import RECIPES, holds_tails
from kernel_pytorch.transforms.ceilings import bounded, roofline

__all__ = ["Float8"]

_AUTO = "auto"
_ROUNDS_MOST = "tensorwise_current"
"""Of the recipes that `auto` chooses among: what emulates them all."""


class Float8:
    """`recipe=NAME` for the linear layers that FP8 is for; with `head=True` also for the one that makes logits.

    `recipe=auto` measures each layer at its own shape and leaves those in their format where FP8 does not pay.

    The gradient of logits is scaled as a whole: its format is E5M2, whose range holds both the one word that counts and
    the tail of the others (a factor of the number of words apart), where E4M3 would round the tail to zero. A search
    proposes it where the configuration allows it (`nvidia.allow_float8_lm_head`). With `loss_head(chunked)` beside it a
    compiled loss needs no logits, where the recipe has one scale a tensor.
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
        return with_head + [Step(self.name, {"recipe": name}) for name in (*RECIPES, _AUTO)]

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
        if recipe not in (_AUTO, *RECIPES):
            raise CandidateError(f"{step}: recipe must be one of {', '.join((_AUTO, *RECIPES))}")
        head = bool(step.params.get("head", False))
        if head and (recipe == _AUTO or not holds_tails(recipe)):
            raise CandidateError(f"{step}: gradients of logits need e5m2, and {recipe} has another format")
        call = next(iter(program.calls.values()), None)
        told = swap_model(program.model, recipe, run=program.call, call=call, allow_head=head)
        program.undo.append(lambda: undo(program.model))
        left = [layer.reason for layer in told.layers if not layer.recipe]
        if not told.converted:
            raise CandidateError(f"{step}: no linear layer is one for FP8: {_reasons(left)}")
        together = Counter(layer.together.partition(" with ")[0] for layer in told.converted)
        program.notes.append(
            f"FP8 ({recipe}): {len(told.converted)} of {len(told.layers)} linear layers, "
            f"{together['a gated MLP'] // 3} gated MLPs as one, {together['one']} layers one with others"
        )
        program.notes += told.notes
        if left:
            program.notes.append(f"linear layers that keep their format: {_reasons(left)}")
        return program

    def emulate(self, model: nn.Module, step: Step) -> nn.Module:
        """Let a model round its operands as the step does, in plain PyTorch and its own precision, and return it.

        What that costs is what a faithful implementation may cost.
        """
        recipe = str(step.params["recipe"])
        for verdict in verdicts(model, allow_head=bool(step.params.get("head", False))):
            if not verdict.reason:
                emulate_linear(verdict.layer, _ROUNDS_MOST if recipe == _AUTO else recipe)
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


def _reasons(reasons: list[str]) -> str:
    counted = Counter(reasons)
    return "; ".join(f"{n} x {reason}" for reason, n in counted.most_common()) or "there is none"
