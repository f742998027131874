"""Gate 5: gradients of what ships against fp64, and a short loss curve beside the unmodified model's.

The curve is a screen, not a proof of convergence: eight paired steps see an optimizer that steps wrongly or an error
that grows, not a slow bias.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from kernel_pytorch.core.program import clone_model
from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import Check, Gate, Step
from kernel_pytorch.core.workload import Workload
from kernel_pytorch.validation.compare import tensor_error
from kernel_pytorch.validation.gradients import Gradients, gradient_checks, gradients_of
from kernel_pytorch.validation.lift import lift_tree, lifted, lifted_model
from kernel_pytorch.validation.oracle import Oracle, loss_of
from kernel_pytorch.validation.precision import declared_dtype, emulation
from kernel_pytorch.validation.subject import Subject, attempt, routed, seeded
from kernel_pytorch.validation.updates import update_check
from kernel_pytorch.validation.vary import nudged, zero_dropout

__all__ = ["training_checks"]

_STEPS = {"quick": 0, "standard": 8, "strict": 16}
_REORDERED = 20.0
_CAST = 3.0
_UPDATES = 4
_SPREAD = 20.0
_NARROW_CURVE = 1e-3
"""What 16-bit activations alone, rounded in another order, move a loss by: 1.5e-4 between two attentions."""
_UNMEASURABLE = 0.3
"""A parameter whose gradient fp32 itself gets this wrong is noise."""


def training_checks(subject: Subject, oracle: Oracle, level: str, low: list[Step], *, drew: bool) -> list[Check]:
    """Return the checks of gradients and of the loss curve.

    Args:
        subject: What is judged.
        oracle: The unmodified model.
        level: `quick` compares gradients only; `strict` takes 16 steps.
        low: The lower-precision steps.
        drew: Whether the model draws random numbers; gradients are then compared with dropout off.
    """
    program = subject.program
    if drew:
        calls = {c: oracle.call(c, 0) for c in subject.workload.cases}
        program, error = attempt(lambda: subject.build(_reference(oracle), subject.candidate, calls))
        if error:
            return [Check("gradients", Gate.TRAINING, math.inf, 0.0, f"the steps do not apply: {error}")]
        routed(program)
    checks = _gradients(subject, oracle, low, program)
    if all(c.passed for c in checks) and _STEPS[level]:
        checks += _update(subject, oracle)
    if all(c.passed for c in checks) and _STEPS[level]:
        checks += _curve(subject, oracle, _STEPS[level], low, subject.program)
    if drew and all(c.passed for c in checks) and _STEPS[level]:
        checks += _curve(subject, oracle, _STEPS[level], low, program, dropout=False)
    return checks


def _reference(oracle: Oracle) -> nn.Module:
    model = clone_model(oracle.reference)
    zero_dropout(model)
    return model


def _emulated(model: nn.Module, low: list[Step]) -> nn.Module:
    """Let a model round as those steps do that emulate their own rounding."""
    for step in low:
        emulate = emulation(step)
        model = model if emulate is None else emulate(model, step)
    return model


def _dearer(costs: Gradients, rounded: Gradients) -> Gradients:
    """Return the gradients that tell the larger cost: emulated rounding costs more than casting to 16 bits."""
    return costs if rounded.error else rounded


def _autocast(oracle: Oracle, low: list[Step]) -> Any:
    dtypes = [d for d in map(declared_dtype, low) if d is not None]
    device = next((p.device.type for p in oracle.reference.parameters()), "cpu")
    return torch.autocast(device, dtypes[0]) if dtypes else nullcontext()


def _gradients(subject: Subject, oracle: Oracle, low: list[Step], program: Program) -> list[Check]:
    case, seed = next(iter(subject.workload.cases)), subject.config.seed
    batch, loss = oracle.batch(case, 0), loss_of(subject.workload)
    key = f"gradients {oracle.identity} {case} {seed}"

    def exact() -> dict[str, Any]:
        model = lifted_model(_reference(oracle))
        wide = lift_tree(batch)
        with lifted():
            return gradients_of(model, loss, wide, seed).as_dict()

    def plain() -> dict[str, Any]:
        return gradients_of(_reference(oracle), loss, batch, seed).as_dict()

    def cast() -> dict[str, Any]:
        with _autocast(oracle, low):
            return gradients_of(_reference(oracle), loss, batch, seed).as_dict()

    def emulated() -> dict[str, Any]:
        return gradients_of(_emulated(_reference(oracle), low), loss, batch, seed).as_dict()

    own = Gradients(**oracle.memo.get(f"{key} plain", plain))
    want = Gradients(**oracle.memo.get(f"{key} exact", exact))
    if want.error:
        oracle.unchecked.append(f"gradients in fp64: the reference raises {want.error}")
        want = own
    costs = own
    if any(declared_dtype(s) for s in low):
        costs = Gradients(**oracle.memo.get(f"{key} {[str(s) for s in low]}", cast))
    rounding = [s for s in low if emulation(s) is not None]
    if rounding:
        costs = _dearer(costs, Gradients(**oracle.memo.get(f"{key} emulated {[str(s) for s in rounding]}", emulated)))
    undeclared = any(declared_dtype(s) is None and emulation(s) is None for s in low)
    kept, budgets = _budgets(want, own, costs, low=bool(low), least=subject.config.max_error if undeclared else 1e-3)
    model = program.model
    with _unchanged(model):
        got = gradients_of(model, program.step_loss(loss), batch, seed)
    return gradient_checks(
        got, kept, gate=Gate.TRAINING, floor=1e-7, budget=subject.config.max_error, budgets=budgets, whole=True,
        case=case,
    )  # fmt: skip


def _update(subject: Subject, oracle: Oracle) -> list[Check]:
    case = next(iter(subject.workload.cases))
    given = gradients_of(_reference(oracle), loss_of(subject.workload), oracle.batch(case, 0), subject.config.seed)
    found = update_check(subject, subject.program, given, steps=_UPDATES, name="update", case=case)
    if isinstance(found, str):
        oracle.unchecked.append(found)
        return []
    return [found]


def _budgets(
    want: Gradients, own: Gradients, costs: Gradients, *, low: bool, least: float
) -> tuple[Gradients, dict[str, float]]:
    """Return the gradients that fp32 can measure, and for each what the declared precision costs, with slack.

    `least` is allowed of any lower precision: `max_error` where a step names no format whose cost could be measured.
    """
    budgets: dict[str, float] = {}
    kept: dict[str, torch.Tensor] = {}
    errors: list[float] = []
    for name, true in want.by_name.items():
        mine = tensor_error(own.by_name[name].flatten(), true.flatten()).row if name in own.by_name else 0.0
        cost = tensor_error(costs.by_name[name].flatten(), true.flatten()).row if name in costs.by_name else mine
        if mine > _UNMEASURABLE or cost > 3 * _UNMEASURABLE:
            continue
        kept[name] = true
        errors.append(cost)
        budgets[name] = max(_CAST * cost, 3 * mine) if low else max(1e-4, _REORDERED * mine)
    typical = sorted(errors)[len(errors) // 2] if errors else 0.0
    if low:
        budgets = {k: max(v, _CAST * typical, least) for k, v in budgets.items()}
    loss = abs(costs.loss - want.loss) / max(abs(want.loss), 1e-12)
    budgets["loss"] = max(_CAST * loss, 2e-2) if low else max(1e-5, _REORDERED * loss)
    return Gradients(want.loss, kept, ""), budgets


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put parameters, buffers and gradients back as they were."""
    tensors = [*model.parameters(), *model.buffers()]
    values = [t.detach().clone() for t in tensors]
    grads = [t.grad for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value, grad in zip(tensors, values, grads, strict=True):
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
                tensor.grad = grad


def _optimizer(workload: Workload, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return workload.optimizer(parameters) if workload.optimizer else torch.optim.AdamW(parameters, lr=1e-3)


def _losses(
    model: nn.Module,
    loss: Callable[[Any, Any], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    batches: list[Any],
    *,
    seed: int,
    context: Callable[[], Any] = nullcontext,
) -> list[float]:
    losses = []
    for i, batch in enumerate(batches):
        optimizer.zero_grad(set_to_none=True)
        with seeded(seed + i), torch.enable_grad():
            with context():
                value = loss(model, batch)
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        losses.append(float(value.detach()))
    optimizer.zero_grad(set_to_none=True)
    return losses


def _resolution(model: nn.Module) -> float:
    """Return the rounding unit of the narrowest floating-point parameter, relative to fp32's."""
    return max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=0.0)


def _curve(
    subject: Subject, oracle: Oracle, steps: int, low: list[Step], program: Program, *, dropout: bool = True
) -> list[Check]:
    """Compare the loss curve with the unmodified model's: same data, same random seeds, same optimizer.

    The budget is three times what autocast costs where a step lowers the precision, and at least 20 times what moving
    the initial parameters by 1e-6 does (three times what moving 16-bit ones by a quarter of their rounding unit does);
    for models that draw random numbers twice the spread over random seeds. That hides what is small, so such a model
    trains a second time without dropout.
    """
    case, seed, workload = next(iter(subject.workload.cases)), subject.config.seed, subject.workload
    batches = [oracle.batch(case, i) for i in range(steps)]
    loss = loss_of(workload)

    def plain(shift: int = 0, *, nudge: bool = False, context: Callable[[], Any] = nullcontext) -> list[float]:
        model = clone_model(oracle.reference) if dropout else _reference(oracle)
        model = nudged(model) if nudge else model
        return _losses(model, loss, _optimizer(workload, model), batches, seed=seed + shift, context=context)

    def rounded() -> list[float]:
        model = _emulated(clone_model(oracle.reference) if dropout else _reference(oracle), low)
        return _losses(model, loss, _optimizer(workload, model), batches, seed=seed)

    key = f"curve {oracle.identity} {seed} {steps} {dropout}"
    want = oracle.memo.get(f"{key} plain", plain)
    moved = oracle.memo.get(f"{key} nudged", lambda: plain(nudge=True))
    narrow = _resolution(oracle.reference) > 1e-4
    spread = [_apart(want, moved) * (_CAST if narrow else _SPREAD)]
    if oracle.observed(case).drew:
        shifts = (101, 202, 303)
        spread += [2 * _apart(want, oracle.memo.get(f"{key} {s}", lambda s=s: plain(s))) for s in shifts]  # type: ignore[misc]
    if any(declared_dtype(s) for s in low):
        cast = oracle.memo.get(f"{key} {[str(s) for s in low]}", lambda: plain(context=lambda: _autocast(oracle, low)))
        spread.append(_CAST * _apart(want, cast))
    rounding = [s for s in low if emulation(s) is not None]
    if rounding:
        spread.append(_CAST * _apart(want, oracle.memo.get(f"{key} emulated {[str(s) for s in rounding]}", rounded)))
    undeclared = any(declared_dtype(s) is None and emulation(s) is None for s in low)
    floor = subject.config.max_error if undeclared else 5e-3 if low else 1e-5
    floor = max(floor, _NARROW_CURVE) if narrow else floor
    budget = max(floor, *spread)
    with _unchanged(program.model):
        optimizer = program.optimizer or _optimizer(workload, program.model)
        before = copy.deepcopy(optimizer.state_dict())
        got, error = attempt(lambda: _losses(program.model, program.step_loss(loss), optimizer, batches, seed=seed))
        optimizer.load_state_dict(before)
    if error:
        return [Check("loss curve", Gate.TRAINING, math.inf, 0.0, f"raises {error}", case)]
    apart = _apart(want, got)
    detail = f"parts from the unmodified model's by {apart:.2g} within {steps} steps" if not apart <= budget else ""
    name = "loss curve" if dropout else "loss curve without dropout"
    return [Check(name, Gate.TRAINING, apart, budget, detail, case)]


def _apart(want: list[float], got: list[float]) -> float:
    if not all(map(math.isfinite, got)):
        return math.inf
    scale = max(abs(x) for x in want) or 1.0
    return max(abs(a - b) for a, b in zip(want, got, strict=True)) / scale
