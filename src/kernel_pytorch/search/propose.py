"""What could be done: every transform's steps for this workload, and why the others have none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kernel_pytorch.core.config import KernelPyTorchConfig
from kernel_pytorch.core.protocols import Transform
from kernel_pytorch.core.types import Candidate, DeviceSpec, Skip, Skipped, Step, WorkloadSpec
from kernel_pytorch.errors import KptError

__all__ = ["Proposals", "propose", "select"]


@dataclass(frozen=True, slots=True)
class Proposals:
    """Steps by transform in catalog order, and the transforms that proposed none.

    Attributes:
        steps: Each transform with its steps, most promising first.
        skipped: Transforms that cannot run here or do not apply, with reason and fix.
    """

    steps: tuple[tuple[Transform, tuple[Step, ...]], ...]
    skipped: tuple[Skipped, ...]

    @property
    def singles(self) -> tuple[Candidate, ...]:
        """Every step alone."""
        return tuple(Candidate((step,)) for _, steps in self.steps for step in steps)

    def transform_of(self, step: Step) -> Transform:
        """Return the transform a step belongs to."""
        return next(t for t, _ in self.steps if t.name == step.transform)

    def combine(self, steps: Iterable[Step]) -> Candidate:
        """Return steps as one candidate, in catalog order (the order of application)."""
        order = {t.name: i for i, (t, _) in enumerate(self.steps)}
        return Candidate(tuple(sorted(steps, key=lambda s: order[s.transform])))


def select(transforms: Sequence[Transform], config: KernelPyTorchConfig) -> tuple[Transform, ...]:
    """Return the transforms that the configuration admits.

    Raises:
        KptError: `only` or `exclude` names a transform that does not exist.
    """
    names = {t.name for t in transforms}
    unknown = sorted((set(config.only) | set(config.exclude)) - names)
    if unknown:
        raise KptError(f"unknown transform {', '.join(map(repr, unknown))}", fix=f"known: {', '.join(sorted(names))}")
    return tuple(t for t in transforms if (not config.only or t.name in config.only) and t.name not in config.exclude)


def _allowed(step: Step, config: KernelPyTorchConfig) -> bool:
    """Return whether the user allows what a step says that it does beyond the usual."""
    return config.nvidia.allow_float8_lm_head or not (step.transform == "float8" and step.params.get("head"))


def propose(
    transforms: Sequence[Transform], workload: WorkloadSpec, device: DeviceSpec, config: KernelPyTorchConfig
) -> Proposals:
    """Ask every admitted transform for steps."""
    steps: list[tuple[Transform, tuple[Step, ...]]] = []
    skipped: list[Skipped] = []
    for transform in select(transforms, config):
        answer: Sequence[Step] | Skip
        if workload.mode not in transform.modes:
            answer = Skip(f"not for {workload.mode}")
        else:
            answer = transform.probe(device) or transform.propose(workload, device)
            if not isinstance(answer, Skip):
                answer = [step for step in answer if _allowed(step, config)]
        if isinstance(answer, Skip):
            skipped.append(Skipped(transform.name, answer.reason, answer.fix))
        elif answer:
            steps.append((transform, tuple(answer)))
        else:
            skipped.append(Skipped(transform.name, "proposed no step for this workload"))
    return Proposals(tuple(steps), tuple(skipped))
