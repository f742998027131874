"""What ships beside the unmodified model at full size, for models that are judged in fp64 by a stand-in.

There is no fp64 truth here: both are off by their own rounding, so budgets are a few times the error that the stand-in
showed. What is looked for is what only the full size brings out: an index that overflows, a tail that is not masked, an
implementation chosen for this shape alone.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from kernel_pytorch.core.program import clone_call, clone_model
from kernel_pytorch.core.types import Check, Gate, Mode, NumericsReport
from kernel_pytorch.validation.compare import compare_values, flatten, structure_checks, tensor_error
from kernel_pytorch.validation.contract import module_checks
from kernel_pytorch.validation.gradients import Gradients, gradient_checks, gradients_of
from kernel_pytorch.validation.oracle import batch_calls, loss_of
from kernel_pytorch.validation.subject import Subject, attempt, run
from kernel_pytorch.validation.updates import update_check
from kernel_pytorch.validation.vary import nudged

__all__ = ["full_size_checks"]

_TWO_ROUNDINGS = 4.0
"""Both sides round, and a deep model rounds more often than its stand-in of two blocks."""
_LEAST = 0.05
_LOSS = 2e-2
_SEEDS = 3
_BEYOND_SEEDS = 1.5
"""Times what the worst of three other seeds does: how far one more may be."""
_SAME_LOSS = 1e-6


def full_size_checks(subject: Subject, short: NumericsReport, unchecked: list[str], *, exact: bool) -> list[Check]:
    """Compare module, outputs, and in training loss, gradients and one optimizer step, at the workload's own inputs.

    Args:
        subject: The candidate as it ships and the unmodified model.
        short: What the stand-in's gates found: its errors set the budgets.
        unchecked: Told what could not be compared.
        exact: Whether no step may change the precision of the state.
    """
    checks = module_checks(subject.program.model, subject.reference, subject.config.mode, same_dtypes=exact)
    if not all(c.passed for c in checks):
        return checks
    for case in subject.workload.cases:
        batch = subject.place(subject.workload.batch(case, subject.config.seed + 1))
        if subject.config.mode is Mode.TRAINING:
            checks += _training(subject, short, unchecked, case, batch)
        else:
            checks += _outputs(subject, short, case, batch)
    return checks


def _outputs(subject: Subject, short: NumericsReport, case: str, batch: Any) -> list[Check]:
    mode, seed = subject.config.mode, subject.config.seed
    call = batch_calls(subject.workload, subject.reference, mode, batch)
    want = flatten(run(clone_model(subject.reference), clone_call(call), mode, seed)).frozen()
    out, error = attempt(lambda: flatten(run(subject.program.model, clone_call(call), mode, seed)).frozen())
    if error:
        return [Check("full size", Gate.PRECISION, math.inf, 0.0, f"raises {error}", case)]
    broken = [c for c in structure_checks(out, want) if not c.passed]
    if broken:
        return broken
    budget = max(subject.config.max_error, _TWO_ROUNDINGS * short.max_rel_error)
    found = compare_values(out, want, samples=True)
    return [_check(f"full size {k}", e.row, budget, case) for k, e in found.items() if not e.discrete]


def _check(name: str, error: float, budget: float, case: str) -> Check:
    detail = f"differs by {error:.2g} from the unmodified model's" if not error <= budget else ""
    return Check(name, Gate.PRECISION, error, budget, detail, case)


def _training(subject: Subject, short: NumericsReport, unchecked: list[str], case: str, batch: Any) -> list[Check]:
    loss, seed, program = loss_of(subject.workload), subject.config.seed, subject.program
    want = gradients_of(subject.reference, loss, batch, seed)
    if want.error:
        return [Check("full size", Gate.TRAINING, math.inf, 0.0, f"the unmodified model raises {want.error}", case)]
    budgets = _rounding(subject, want, batch)
    got = gradients_of(program.model, program.step_loss(loss), batch, seed)
    least = max(_LEAST, _TWO_ROUNDINGS * _typical(short))
    spread = _spread(subject, want, batch)
    if spread:
        unchecked.append(
            "at full size the model draws random numbers, and other code draws others: loss and gradients are held "
            "against what another seed does to the unmodified model's"
        )
    budgets = {
        name: max(least, budgets.get(name, 0.0), spread.get(name, 0.0))
        for name in (*budgets, *spread)
        if name != "loss"
    } | {"loss": max(_LOSS, spread.get("loss", 0.0))}
    checks = gradient_checks(
        got, want, gate=Gate.TRAINING, floor=1e-3, budget=least, budgets=budgets, whole=True, case=case
    )
    del got
    if all(c.passed for c in checks):
        found = update_check(subject, program, want, steps=1, name="update at full size", case=case)
        if isinstance(found, str):
            unchecked.append(found)
        else:
            checks.append(found)
    return checks


def _rounding(subject: Subject, want: Gradients, batch: Any) -> dict[str, float]:
    """Return a few times what moving the parameters by a fraction of their rounding unit does to each gradient.

    Errors grow with depth: two faithful implementations part further at 8 blocks than at 2.
    """
    moved = nudged(clone_model(subject.reference))
    found = gradients_of(moved, loss_of(subject.workload), batch, subject.config.seed)
    return {
        name: _TWO_ROUNDINGS * tensor_error(found.by_name[name].flatten(), true.flatten()).row
        for name, true in want.by_name.items()
        if name in found.by_name
    }


def _spread(subject: Subject, want: Gradients, batch: Any) -> dict[str, float]:
    """Return half as much again as other seeds take loss and gradients of the unmodified model; empty if none does.

    Compiled code draws dropout's masks by a generator of its own, so it is as far from the unmodified model as that is
    from itself under another seed.
    """
    loss, found = loss_of(subject.workload), dict[str, float]()
    for i in range(_SEEDS):
        other = gradients_of(subject.reference, loss, batch, subject.config.seed + 101 * (i + 1))
        apart = abs(other.loss - want.loss) / max(abs(want.loss), 1e-12)
        if other.error or (not i and apart <= _SAME_LOSS):
            return {}
        rows = {n: tensor_error(other.by_name[n].flatten(), g.flatten()).row for n, g in want.by_name.items()}
        for name, row in (*rows.items(), ("loss", apart)):
            found[name] = max(found.get(name, 0.0), _BEYOND_SEEDS * row)
    return found


def _typical(short: NumericsReport) -> float:
    """Return the median error of the stand-in's gradients against fp64."""
    errors = [c.error for c in short.checks if c.gate is Gate.TRAINING and c.name.startswith("grad ")]
    return statistics.median(errors) if errors else 0.0
