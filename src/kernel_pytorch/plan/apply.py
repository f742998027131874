"""Replay a plan: on a copy of a model, or in place on a model and optimizer that the user trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_pytorch.catalog import TRANSFORMS, apply_candidate
from kernel_pytorch.core.describe import fingerprint
from kernel_pytorch.core.program import begin, call_counts, clone_model, ship
from kernel_pytorch.core.types import Candidate, DeviceSpec, Mode, Plan
from kernel_pytorch.core.workload import Call, as_call
from kernel_pytorch.errors import CandidateError, KptError, ModelError, PlanError
from kernel_pytorch.hardware import detect
from kernel_pytorch.plan import compile_cache
from kernel_pytorch.plan.store import load_plan

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kernel_pytorch.core.protocols import Program, Transform

__all__ = ["apply", "check_device", "check_model", "load_compiled", "prepare"]

log = logging.getLogger(__name__)

_AGAIN = "run `kpt optimize` for it"


def apply(
    plan: Plan | str | Path,
    model: nn.Module,
    *,
    inputs: Any = None,
    trust_artifacts: bool = False,
    outside: str = "original",
    transforms: Sequence[Transform] = TRANSFORMS,
    deploy_to: Path | None = None,
) -> nn.Module:
    """Return a copy of a model that runs as the plan says; the model itself is not modified.

    The copy is of the same class with the same `state_dict` keys, in eval mode for an inference plan and in train
    mode for a training plan, of which it gets what concerns the model: steps that change an optimizer are left to
    `prepare`, and a warning says so. Calls outside the plan (another mode, gradients where there were none, shapes that
    a step specialised on) run the unmodified model and are counted: `call_counts(model)`.

    Args:
        plan: A plan, its file, or the directory of its search.
        model: A model of the plan's structure, with any weights.
        inputs: Example inputs, or a mapping of case name to `Call`; needed by steps that trace or calibrate. Without
            them, the input signatures stored in the plan guard what is compiled for a shape.
        trust_artifacts: Whether code in the plan's `artifacts/` may be loaded.
        outside: `original` runs calls outside the plan on the unmodified model, which stays in memory for that;
            `error` raises `InputsError`.
        transforms: What the plan's steps may name, in order of application.
        deploy_to: Where steps write what is deployed beside the plan (a compiled package); nothing by default.

    Raises:
        PlanError: The plan cannot be read, or is for another model or device.
        CandidateError: A step does not apply to this model.
    """
    if outside not in ("original", "error"):
        raise KptError(f"outside must be 'original' or 'error', got {outside!r}")
    plan, artifacts = _resolve(plan)
    check_model(plan, model)
    device = _here(plan)
    check_device(plan, device)
    copy = clone_model(model)
    copy.train(plan.workload.mode is Mode.TRAINING)
    program = begin(copy, plan.workload.mode, _calls(plan, inputs))
    program.artifact_dir, program.trust_artifacts = deploy_to or artifacts, trust_artifacts
    load_compiled(program, device)
    program = apply_candidate(program, _without_optimizer(program, plan.candidate, transforms), transforms)
    fallback = model if plan.candidate.steps else copy
    program.holds.append(fallback)
    return ship(program, fallback if outside == "original" else None, _signatures(plan))


def prepare(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    plan: Plan | str | Path,
    inputs: Any = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    trust_artifacts: bool = False,
    transforms: Sequence[Transform] = TRANSFORMS,
) -> tuple[nn.Module, Any]:
    """Apply a training plan to a model and optimizer in place; the loop, clipping and schedule stay the user's.

    The parameters stay the same objects, so the optimizer and everything else that holds them remains valid.
    `restore(model)` undoes every step.

    Args:
        model: A model of the plan's structure.
        optimizer: The optimizer over its parameters; needed where the plan changes it.
        plan: A training plan, its file, or the directory of its search.
        inputs: Example inputs; see `apply`.
        loss: `loss(model, batch) -> scalar`, as in the workload; for plans that compile it with the model, which
            `kp.fused_loss` then calls. Without it, the loss that the model returns.
        trust_artifacts: Whether code in the plan's `artifacts/` may be loaded.
        transforms: What the plan's steps may name, in order of application.

    Returns:
        The model and the optimizer to use.

    Raises:
        PlanError: The plan cannot be read, is for inference, or is for another model or device.
        CandidateError: A step does not apply to this model or optimizer; nothing was changed.
        ModelError: A plan is applied to the model already.
    """
    plan, artifacts = _resolve(plan)
    if plan.workload.mode is not Mode.TRAINING:
        raise PlanError("prepare() takes a training plan, this one is for inference", fix="kp.apply(plan, model)")
    if _has_plan(model):
        raise ModelError("a plan is applied to this model already", fix="kp.restore(model) first")
    check_model(plan, model)
    device = _here(plan)
    check_device(plan, device)
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    program = begin(model, Mode.TRAINING, _calls(plan, inputs), optimizer=optimizer, loss=loss)
    undo = program.undo
    try:
        program.artifact_dir, program.trust_artifacts = artifacts, trust_artifacts
        load_compiled(program, device)
        program = apply_candidate(program, plan.candidate, transforms)
        if {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} != before:
            raise CandidateError(f"{plan.candidate} replaces parameters, which would part them from the optimizer")
    except KptError:
        while undo:
            undo.pop()()
        raise
    return ship(program, model), program.optimizer


def _without_optimizer(program: Program, candidate: Candidate, transforms: Sequence[Transform]) -> Candidate:
    """Return a candidate less the steps that change an optimizer, which a model alone has not; say which."""
    groups = {t.name: t.group for t in transforms}
    left = tuple(s for s in candidate.steps if groups.get(s.transform) == "optimizer")
    if left:
        names = ", ".join(map(str, left))
        program.notes.append(f"not applied, for it needs the optimizer (kp.prepare(model, optimizer, ...)): {names}")
        log.warning("%s", program.notes[-1])
    return Candidate(tuple(s for s in candidate.steps if s not in left))


def load_compiled(program: Program, device: DeviceSpec) -> None:
    """Load the plan's compile cache where it has one that is trusted and fits; else say why it compiles afresh.

    Raises:
        PlanError: The cache is corrupted.
    """
    if program.artifact_dir is None or not compile_cache.present(program.artifact_dir):
        return
    skip = compile_cache.load(program.artifact_dir, device, trust=program.trust_artifacts)
    if skip is not None:
        program.notes.append(f"compiled afresh: {skip.reason} ({skip.fix})")
        log.log(logging.WARNING if program.trust_artifacts else logging.INFO, "%s", program.notes[-1])


def check_model(plan: Plan, model: nn.Module) -> None:
    """Refuse a model whose structure is not the plan's.

    Raises:
        PlanError: Another model.
    """
    found = fingerprint(model)
    if found == plan.workload.fingerprint:
        return
    count = sum(p.numel() for p in model.parameters())
    detail = f"{count:,} parameters, the plan's has {plan.workload.parameters:,}"
    if count == plan.workload.parameters:
        detail = "same number of parameters, other modules, names, shapes or dtypes"
    raise PlanError(
        f"the plan is for another model than this {type(model).__name__}: {plan.workload.name or 'unnamed'} ({detail})",
        fix=_AGAIN,
    )


def check_device(plan: Plan, device: DeviceSpec) -> None:
    """Refuse a device of another vendor or architecture; log what else differs.

    Raises:
        PlanError: Another vendor or architecture.
    """
    made = plan.device
    if (made.vendor, made.arch) != (device.vendor, device.arch):
        raise PlanError(
            f"the plan is for another device: {made.vendor} {made.arch} ({made.name}), "
            f"this is {device.vendor} {device.arch} ({device.name})",
            fix="run `kpt optimize` on this machine",
        )
    if made.num_devices != device.num_devices:
        log.warning("the plan was made on %d devices or cores, here are %d", made.num_devices, device.num_devices)
    for name in sorted({*made.software} & {*device.software}):
        if made.software[name] != device.software[name]:
            log.warning("the plan was made with %s %s, here is %s", name, made.software[name], device.software[name])


def _resolve(plan: Plan | str | Path) -> tuple[Plan, Path | None]:
    if isinstance(plan, Plan):
        return plan, None
    path = Path(plan).expanduser()
    return load_plan(path), (path if path.is_dir() else path.parent) / "artifacts"


def _calls(plan: Plan, inputs: Any) -> dict[str, Call]:
    if inputs is None:
        return {}
    if isinstance(inputs, Mapping) and inputs and all(isinstance(v, Call) for v in inputs.values()):
        return dict(inputs)
    return {next(iter(plan.workload.signatures), "main"): as_call(inputs)}


def _signatures(plan: Plan) -> set[tuple[Any, ...]]:
    return set(plan.workload.signatures.values())


def _has_plan(model: nn.Module) -> bool:
    try:
        call_counts(model)
    except ModelError:
        return False
    return True


def _here(plan: Plan) -> DeviceSpec:
    """Return this machine's device of the plan's vendor, else its best one."""
    try:
        return detect(plan.device.vendor)
    except KptError:
        return detect()
