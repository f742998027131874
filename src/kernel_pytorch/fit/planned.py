"""What the TPU compiler says of the memory of a plan's step, unmodified and as chosen."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import cloudpickle  # type: ignore[import-untyped,unused-ignore]

from kernel_pytorch.backends.tpu.topology import GENERATIONS, parse_topology
from kernel_pytorch.core.step_memory import ModuleMemory, StepMemory, Whose
from kernel_pytorch.core.types import Candidate, DeviceSpec, WorkloadSpec
from kernel_pytorch.core.workload import Workload
from kernel_pytorch.errors import KptError
from kernel_pytorch.fit.build import Build
from kernel_pytorch.fit.outcome import Fit
from kernel_pytorch.fit.tpu import fit_tpu

__all__ = ["memory_of"]

_COMPILE_STEPS = frozenset({"compile", "regional_compile"})
"""Steps that say how much is compiled at once; ahead of time it is the whole step."""
_ELSEWHERE = "v5e"
"""The generation asked about where the device is emulated, as `kpt fit` does without `--topology`."""
_MODULES = 10


def memory_of(
    workload: Workload,
    spec: WorkloadSpec,
    device: DeviceSpec,
    chosen: Candidate,
    *,
    topology: str = "",
    timeout_s: float,
    trust_remote_code: bool = False,
) -> tuple[StepMemory, ...]:
    """Ask the TPU compiler what the step takes on one device of a slice; nothing runs, and no chip is needed.

    Args:
        workload: What the plan is for.
        spec: Its description; the case with the largest inputs is asked about.
        device: The plan's device.
        chosen: What the plan applies.
        topology: The slice, each of whose devices runs the step on a batch of its own. Empty: one chip of the device's
            generation; where it is emulated, one v5e chip.
        timeout_s: Limit of each compilation.
        trust_remote_code: As `load_target` takes it.

    Returns:
        The unmodified step's memory, and the chosen one's where the plan changes what is computed. Where the compiler
        does not answer, the entry says why.

    Raises:
        TopologyError: There is no such slice.
    """
    generation = device.arch if device.arch in GENERATIONS else _ELSEWHERE
    slice_ = parse_topology(topology or f"{generation}:1")
    case = max(spec.signatures, key=lambda name: sum(math.prod(s.shape) for s in spec.signatures[name]))
    build = Build(workload.target or workload, spec.mode, case=case, trust_remote_code=trust_remote_code)

    try:
        cloudpickle.dumps(build)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        reason = f"the workload cannot be sent to another process: {error}"
        return (StepMemory(Whose.UNMODIFIED, slice_.name, case, reason=reason),)

    def asked(whose: Whose, candidate: Candidate) -> StepMemory:
        try:
            return _told(fit_tpu(replace(build, candidate=candidate), slice_, timeout_s=timeout_s), whose, case)
        except KptError as error:
            reason = f"{error}; {error.fix}" if error.fix else str(error)
            return StepMemory(whose, slice_.name, case, reason=reason)

    unmodified = asked(Whose.UNMODIFIED, Candidate())
    computed = Candidate(tuple(s for s in chosen.steps if s.transform not in _COMPILE_STEPS))
    return (unmodified, asked(Whose.CHOSEN, computed)) if computed.steps else (unmodified,)


def _told(fit: Fit, whose: Whose, case: str) -> StepMemory:
    return StepMemory(
        whose=whose,
        place=fit.place,
        case=case,
        fits=fit.fits,
        peak_bytes=fit.peak_bytes,
        needed_bytes=fit.needed_bytes,
        capacity_bytes=fit.capacity_bytes,
        parts=dict(fit.parts),
        modules=tuple(ModuleMemory(m.module, m.bytes) for m in fit.modules[:_MODULES]),
        reason=fit.message.splitlines()[0] if fit.message else "",
    )
