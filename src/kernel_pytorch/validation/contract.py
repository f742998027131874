"""Gate 1: structure, shapes, dtypes, finiteness and side effects of what ships."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import nn

from kernel_pytorch.core.types import Check, Gate, Mode
from kernel_pytorch.validation.compare import Flat, compare_values, structure_checks, tensor_error
from kernel_pytorch.validation.subject import Observed

__all__ = ["module_checks", "sequence_checks", "ties"]


def _fail(name: str, detail: str, case: str = "") -> Check:
    return Check(name, Gate.CONTRACT, math.inf, 0.0, detail, case)


def _ok(name: str, case: str = "") -> Check:
    return Check(name, Gate.CONTRACT, 0.0, 0.0, "", case)


def sequence_checks(
    got: Observed, want: Observed, case: str, *, repeats: list[tuple[int, int]], tolerance: float, noise: float
) -> list[Check]:
    """Compare what a sequence of calls returned and left behind with the unmodified model's.

    Args:
        got: The candidate's.
        want: The unmodified model's.
        case: Goes into the checks.
        repeats: Pairs of calls with the same arguments and seed.
        tolerance: Error allowed between equal calls, and in what calls change (rounding, not bugs).
        noise: The unmodified model's own error between equal calls.
    """
    if got.error:
        return [_fail("runs", f"raises at {got.error}", case)]
    for i, (a, b) in enumerate(zip(got.outputs, want.outputs, strict=True)):
        bad = [c for c in structure_checks(a, b, case=case) if not c.passed]
        if bad:
            where = f" (at call {i + 1})" if i else ""
            return [Check(c.name, c.gate, c.error, c.budget, c.detail + where, c.case) for c in bad]
    checks = [_ok("structure output", case)]
    checks.append(
        _fail("output kept", f"the output of call {got.overwritten[0] + 1} changes during the next call", case)
        if got.overwritten and not want.overwritten
        else _ok("output kept", case)
    )
    checks.append(_inputs(got, want, case, tolerance))
    checks.extend(_repeats(got, want, case, repeats=repeats, tolerance=tolerance, noise=noise))
    checks.extend(_state(got, want, case, tolerance))
    return checks


def _inputs(got: Observed, want: Observed, case: str, tolerance: float) -> Check:
    for i in range(len(want.inputs)):
        mine, theirs = set(got.mutated.get(i, [])), set(want.mutated.get(i, []))
        if mine - theirs:
            return _fail("inputs", f"{min(mine - theirs)} is changed in place; the reference leaves it", case)
        if theirs - mine:
            return _fail("inputs", f"{min(theirs - mine)} is not updated in place; the reference does so", case)
        worst = _worst(got.inputs[i], want.inputs[i], theirs)
        if worst > tolerance:
            return Check("inputs", Gate.CONTRACT, worst, tolerance, "an input is updated to other values", case)
    return _ok("inputs", case)


def _worst(got: Flat, want: Flat, paths: set[str]) -> float:
    errors = compare_values(got, want)
    return max((errors[p].row for p in paths if p in errors), default=0.0)


def _repeats(
    got: Observed, want: Observed, case: str, *, repeats: list[tuple[int, int]], tolerance: float, noise: float
) -> list[Check]:
    checks = []
    for i, j in repeats:
        theirs = max((e.row for e in compare_values(want.outputs[j], want.outputs[i]).values()), default=0.0)
        if theirs > max(3 * noise, 0.0):
            continue
        mine = max((e.row for e in compare_values(got.outputs[j], got.outputs[i]).values()), default=0.0)
        budget = max(3 * noise, tolerance / 10)
        detail = f"calls {i + 1} and {j + 1} have the same inputs and differ by {mine:.2g}" if mine > budget else ""
        checks.append(Check("repeatable", Gate.CONTRACT, mine, budget, detail, case))
    return checks


def _state(got: Observed, want: Observed, case: str, tolerance: float) -> list[Check]:
    mine, theirs = ({k for k in seen.changed if not k.startswith("module ")} for seen in (got, want))
    modules = [k for k in got.changed if k.startswith("module ") and k not in want.changed]
    checks = []
    if modules:
        who = modules[0].removeprefix("module ") or "the model"
        checks.append(_fail("modules", f"{who} changes mode or hooks", case))
    if mine - theirs:
        checks.append(_fail(f"state {min(mine - theirs)}", "is changed by a call; the reference leaves it", case))
    if theirs - mine:
        checks.append(_fail(f"state {min(theirs - mine)}", "is no longer updated; the reference does so", case))
    budget = max(0.1, 5 * tolerance)
    for name, delta in want.deltas.items():
        if name in got.deltas and got.deltas[name].shape == delta.shape:
            error = tensor_error(got.deltas[name], delta).row
            detail = "is updated to other values" if error > budget else ""
            checks.append(Check(f"buffer {name}", Gate.CONTRACT, error, budget, detail, case))
    return checks or [_ok("state", case)]


def ties(model: nn.Module) -> set[frozenset[str]]:
    """Return the groups of parameter and buffer names that share one tensor."""
    groups: dict[tuple[int, ...], set[str]] = defaultdict(set)
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        plain = type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer) and tensor.layout is torch.strided
        pointer = tensor.data_ptr() if plain and tensor.numel() else 0
        groups[(pointer, *tensor.shape) if pointer else (id(tensor), -1)].add(name)
    return {frozenset(g) for g in groups.values() if len(g) > 1}


def module_checks(candidate: nn.Module, reference: nn.Module, mode: Mode, *, same_dtypes: bool) -> list[Check]:
    """Compare class, `state_dict` keys, shapes, ties, modes and what needs gradients of two modules.

    Args:
        candidate: What ships.
        reference: The unmodified model.
        mode: In training, `requires_grad` and dtypes of parameters must agree too.
        same_dtypes: Whether no step may change the precision of the state.
    """
    checks = []
    if type(candidate) is not type(reference):
        names = [type(m).__qualname__ for m in (candidate, reference)]
        checks.append(_fail("class", f"is {names[0]}; the reference {names[1]}"))
    checks += _state_dict(candidate, reference, same_dtypes=same_dtypes or mode is Mode.TRAINING)
    missing = [g for g in ties(reference) if not any(g <= h for h in ties(candidate))]
    if missing:
        checks.append(_fail("ties", f"{' and '.join(sorted(missing[0]))} are no longer one tensor"))
    modes = {n: m.training for n, m in reference.named_modules()}
    flipped = [n for n, m in candidate.named_modules() if n in modes and m.training != modes[n]]
    if flipped:
        now = "train" if not modes[flipped[0]] else "eval"
        checks.append(_fail("modes", f"{flipped[0] or 'the model'} is in {now} mode; the reference is not"))
    if mode is Mode.TRAINING:
        wants = {n: p.requires_grad for n, p in reference.named_parameters()}
        other = [n for n, p in candidate.named_parameters() if wants.get(n, p.requires_grad) != p.requires_grad]
        if other:
            checks.append(_fail("requires_grad", f"{other[0]}.requires_grad differs from the reference"))
    return checks or [_ok("module")]


def _state_dict(candidate: nn.Module, reference: nn.Module, *, same_dtypes: bool) -> list[Check]:
    checks = []
    mine, theirs = candidate.state_dict(), reference.state_dict()
    lost, added = sorted(theirs.keys() - mine.keys()), sorted(mine.keys() - theirs.keys())
    if lost or added:
        what = f"{lost[0]} is missing" if lost else f"{added[0]} is new"
        checks.append(_fail("state_dict", f"{what}: the original checkpoint no longer fits"))
    for name in theirs.keys() & mine.keys():
        a, b = mine[name], theirs[name]
        if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
            continue
        if a.shape != b.shape:
            checks.append(_fail(f"state_dict {name}", f"has shape {tuple(a.shape)}; the reference {tuple(b.shape)}"))
        elif a.dtype != b.dtype and same_dtypes:
            checks.append(_fail(f"state_dict {name}", f"is {a.dtype}; the reference {b.dtype}"))
    return checks
