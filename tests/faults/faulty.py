"""Transforms with one deliberate fault each, in up to three sizes, declared as a liar would declare them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import (
    DeviceSpec,
    Gate,
    Mode,
    Numerics,
    Prediction,
    Skip,
    Step,
    WorkloadSpec,
)

from . import strikes_calls as calls
from . import strikes_state as state
from . import strikes_values as values
from .damage import SIZES

INFERENCE, TRAINING = frozenset({Mode.INFERENCE}), frozenset({Mode.TRAINING})
BOTH = INFERENCE | TRAINING
C, S, K, P, T = Gate.CONTRACT, Gate.STRUCTURE, Gate.KERNEL, Gate.PRECISION, Gate.TRAINING
NUMBERS = ((S, r"output|loss|grad|buffer"), (C, r"buffer|random"))
"""Wrong numbers; what a model draws random numbers for is wrong in its moments."""


@dataclass(frozen=True)
class Faulty:
    """A transform with a fault.

    Attributes:
        strike: Puts the fault of one size into a program.
        sizes: How much of a tensor can be struck.
        expected: For which reasons it may be rejected: gate, and a pattern of the names of its checks.
        outermost: Whether it is applied after casts and compilation, as a fault of a runtime would be.
        sequence: Whether only models whose input has a length can have it.
    """

    name: str
    summary: str
    strike: Callable[[Program, str], None]
    expected: tuple[tuple[Gate, str], ...]
    sizes: tuple[str, ...] = SIZES
    modes: frozenset[Mode] = BOTH
    numerics: Numerics = Numerics.REORDERED
    outermost: bool = False
    sequence: bool = False
    group: str = field(default="fault", init=False)
    compiles: bool = field(default=False, init=False)

    def step(self, size: str) -> Step:
        """Return the step that applies this fault in one size."""
        return Step(self.name, {"size": size})

    def probe(self, device: DeviceSpec) -> Skip | None:
        """Return nothing: a fault runs anywhere."""
        return None

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """Return one step for each size."""
        if workload.mode not in self.modes:
            return Skip(f"a fault of {' and '.join(sorted(self.modes))}")
        return [self.step(size) for size in self.sizes]

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """Return that nothing is known."""
        return float("inf")

    def apply(self, program: Program, step: Step) -> Program:
        """Strike; raises CandidateError where the model has nothing to strike."""
        self.strike(program, str(step.params["size"]))
        return program

    def source(self, step: Step) -> str:
        """Return a comment: a fault is never ejected."""
        return f"# fault: {self.summary}"


LOW = ((S, "output|grad"), (K, ""), (P, ""), (T, "grad"), (C, "random"))
WHOLE = ("tensor",)

FAULTS: tuple[Faulty, ...] = (
    Faulty(
        "output_dtype",
        "output dtype changed",
        calls.output_dtype,
        ((C, "dtype"),),
        WHOLE,
        INFERENCE,
        Numerics.EXACT,
        outermost=True,
    ),
    Faulty("bias_dropped", "a bias dropped", values.bias_dropped, NUMBERS),
    Faulty("zeroed", "the output of a layer zeroed", values.zeroed, NUMBERS),
    Faulty("batch_permuted", "right shape, permuted batch", values.batch_permuted, NUMBERS),
    Faulty(
        "wrong_gradient",
        "right forward, half the gradient",
        values.wrong_gradient,
        ((S, "grad"), (T, "grad")),
        modes=TRAINING,
    ),
    Faulty("nan_third_call", "NaN at the third call only", calls.nan_third_call, ((C, "finite"),), outermost=True),
    Faulty("other_batch", "wrong at another batch size", values.other_batch, NUMBERS),
    Faulty("other_length", "wrong at another sequence length", values.other_length, NUMBERS, sequence=True),
    Faulty(
        "mode_left",
        "eval and train mode left flipped",
        state.mode_left,
        ((C, "mode"),),
        ("tensor", "channel"),
        numerics=Numerics.EXACT,
    ),
    Faulty(
        "mode_inside",
        "eval and train mode flipped during the call",
        state.mode_inside,
        ((C, "mode|random|dropout|state|rng"), (P, "output"), *NUMBERS),
        ("tensor", "channel"),
        numerics=Numerics.EXACT,
    ),
    Faulty(
        "rng_fixed",
        "random numbers made deterministic",
        state.rng_fixed,
        ((C, "random|rng|dropout|seed"), (S, "output"), (P, "output")),
        ("tensor", "channel"),
        outermost=True,
    ),
    Faulty(
        "buffer_stale",
        "BatchNorm statistics no longer updated",
        state.buffer_stale,
        ((C, "buffer|state"), (S, "buffer")),
        modes=TRAINING,
    ),
    Faulty(
        "input_mutated",
        "an input mutated in place",
        calls.input_mutated,
        ((C, "input"),),
        modes=INFERENCE,
        outermost=True,
    ),
    Faulty("untied", "tied weights untied", state.untied, ((C, "tie"),), WHOLE, numerics=Numerics.EXACT),
    Faulty(
        "structure",
        "output structure changed",
        calls.structure,
        ((C, "structure|type"),),
        WHOLE,
        INFERENCE,
        Numerics.EXACT,
        outermost=True,
    ),
    Faulty(
        "drift",
        "error growing over the steps of the loss curve",
        state.drift,
        ((T, "loss|step|param|curve|update"),),
        modes=TRAINING,
    ),
    Faulty("softmax_scale", "softmax scale off by 1 %", values.softmax_scale, NUMBERS),
    Faulty("wrong_eps", "eps of a normalisation ten times too large (at least 1e-5)", values.wrong_eps, NUMBERS),
    Faulty(
        "overwritten", "an output changes under the next call", calls.overwritten, ((C, "output kept"),), outermost=True
    ),
    Faulty(
        "recompile_limit",
        "the recompile limit hit silently",
        calls.recompile_limit,
        ((C, "recompil"),),
        WHOLE,
        numerics=Numerics.EXACT,
        outermost=True,
    ),
    Faulty(
        "low_precision_scale",
        "a bfloat16 layer with its scale off by 1 %",
        values.low_precision_scale,
        LOW,
        numerics=Numerics.LOWER_PRECISION,
    ),
    Faulty(
        "low_precision_bias",
        "a bfloat16 layer that drops its bias",
        values.low_precision_bias,
        LOW,
        numerics=Numerics.LOWER_PRECISION,
    ),
)

BY_NAME = {fault.name: fault for fault in FAULTS}
