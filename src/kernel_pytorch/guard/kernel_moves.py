"""The difference of two profiles: which kernels got slower, came, or took another's place."""

from __future__ import annotations

import collections
import difflib
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kernel_pytorch.guard.kernel_names import class_of, condensed
from kernel_pytorch.guard.profile import OUTSIDE

__all__ = ["Move", "Moves", "compare_profiles"]

_LEAST_NOISE, _MOST_NOISE = 0.01, 0.10
_COUNTS_FROM = 0.005
"""Kernels below this share of the whole say nothing about the noise of a profile."""
_SIGMAS = 3.0
_BACKWARD = " backward"
_FEW = 4
_ALIKE = 0.6

_MAY_REPLACE = {
    "attention": ("matmul", "reduction"),
    "fused": ("elementwise", "reduction", "normalization", "copy", "embedding"),
    "optimizer": ("elementwise", "fused"),
    "normalization": ("reduction", "elementwise", "fused"),
}
"""Classes that do the work of another in pieces: attention as two products and a softmax, what was fused as single
operators."""
_BY_LIKENESS = ("elementwise", "reduction", "copy", "other", "embedding")
"""Classes of many unrelated kernels: one takes another's place only where their names are alike."""


@dataclass(frozen=True, slots=True)
class Move:
    """Kernels whose time changed, together.

    Attributes:
        what: In words, without figures: `flash_fwd_kernel replaced by gemm_a and softmax_b`.
        kind: The class of the kernels (`kernel_names.class_of`).
        base_ms: Their time on the old side.
        head_ms: And on the new one.
        names: All their names.
    """

    what: str
    kind: str
    base_ms: float
    head_ms: float
    names: tuple[str, ...]

    @property
    def delta_ms(self) -> float:
        """What the step pays for it."""
        return self.head_ms - self.base_ms


@dataclass(frozen=True, slots=True)
class Moves:
    """What differs between two profiles.

    Attributes:
        slower: Kernels that cost more, largest first.
        alike: The factor by which every kernel got slower alike; 1.0 where they did not.
        alike_ms: What that costs.
        base_ms: Sum of the old profile.
        head_ms: Sum of the new one.
        whole: Whether the sums are those of whole calls, so that nothing lies between what they hold.
    """

    slower: tuple[Move, ...]
    alike: float
    alike_ms: float
    base_ms: float
    head_ms: float
    whole: bool


def compare_profiles(
    base: Mapping[str, float],
    head: Mapping[str, float],
    *,
    base_ms: float = 0.0,
    head_ms: float = 0.0,
) -> Moves:
    """Return what moved between two profiles of one call.

    What all kernels share (a lower clock) is taken off first. What then stands out of the noise, which is told from the
    kernels that both profiles have, is a move: a kernel in both; a new one; or kernels that came where others of their
    class went, which count together.

    Args:
        base: Profile of the old side, from `profile.kernels_ms`.
        head: Of the new side.
        base_ms: Time of a call of the old side without a profiler; 0.0 where it is not known. A CPU's profiles, which
            hold the whole call, are scaled to both times, by one factor.
        head_ms: Of the new side.
    """
    old, new = condensed(base), condensed(head)
    if OUTSIDE in old and OUTSIDE in new and min(base_ms, head_ms) > 0.0:
        # The smaller one: of a machine that was busy while it was timed, more than the model is in those times.
        scale = min(base_ms / sum(old.values()), head_ms / sum(new.values()))
        old, new = ({name: ms * scale for name, ms in profile.items()} for profile in (old, new))
    whole = max(sum(old.values()), 1e-9)
    both = [name for name in old if name in new]
    logs = {name: math.log(new[name] / old[name]) for name in both if min(old[name], new[name]) > 0.0}
    weighty = {name: log for name, log in logs.items() if max(old[name], new[name]) >= _COUNTS_FROM * whole}
    noise = _noise(list(weighty.values()))
    shared = _shared_log(weighty, old, noise)
    factor = math.exp(shared)
    expected = {name: old[name] * factor for name in old}

    grown = [name for name, log in logs.items() if log - shared > _SIGMAS * noise]
    gone = [name for name in old if name not in new]
    come = [name for name in new if name not in old]
    moves = _moves(gone, come, grown, expected, new)
    moves = _in_pieces(moves, gone, expected)
    moves = _by_class(moves)
    slower = sorted((move for move in moves if move.delta_ms > 0.0), key=lambda move: -move.delta_ms)
    alike_ms = (factor - 1.0) * sum(old[name] for name in both)
    holds_all = OUTSIDE in old and OUTSIDE in new
    return Moves(tuple(slower), factor, alike_ms, sum(old.values()), sum(new.values()), whole=holds_all)


def _noise(logs: Sequence[float]) -> float:
    """Return the standard deviation of a kernel's time from one profile to the next, in logarithms.

    From the half of the kernels that changed most alike (the shortest half, Rousseeuw 1984): a median deviation would
    grow with the moves themselves where nearly half of the kernels moved.
    """
    if len(logs) < _FEW:
        return _LEAST_NOISE
    ordered, half = sorted(logs), math.ceil(len(logs) / 2)
    width = min(ordered[i + half - 1] - ordered[i] for i in range(len(ordered) - half + 1))
    return min(_MOST_NOISE, max(_LEAST_NOISE, width / (2.0 * 0.6745)))


def _shared_log(logs: Mapping[str, float], old: Mapping[str, float], noise: float) -> float:
    """Return the logarithm of the factor by which all kernels got slower; 0.0 where three quarters of them did not."""
    if len(logs) < _FEW:
        return 0.0
    centre = statistics.median(logs.values())
    if centre < max(2.0 * noise / math.sqrt(len(logs)), _LEAST_NOISE):
        return 0.0
    with_it = [name for name, log in logs.items() if abs(log - centre) < max(_SIGMAS * noise, centre / 2.0)]
    share = sum(old[name] for name in with_it) / sum(old[name] for name in logs)
    return centre if len(with_it) >= 0.75 * len(logs) and share >= 0.75 else 0.0


def _moves(
    gone: Sequence[str], come: Sequence[str], grown: Sequence[str], old: Mapping[str, float], new: Mapping[str, float]
) -> list[Move]:
    """Return kernels that got slower, and new ones each with those whose place they took.

    In a class whose kernels do each other's work (matrix products) all that came or grew takes the place of all that
    went; elsewhere, where the names are alike.
    """
    left, arrived, slower = _grouped(gone), _grouped(come), _grouped(grown)
    moves = []
    for kind in dict.fromkeys((*arrived, *slower)):
        free, names = left[kind], arrived[kind]
        if kind in _BY_LIKENESS:
            for name in names:
                like = difflib.get_close_matches(name, free, n=1, cutoff=_ALIKE)
                free = [other for other in free if other not in like]
                moves.append(_move(kind, like, [name], old, new))
        elif free:
            moves.append(_move(kind, free, [*names, *slower.pop(kind, ())], old, new))
        else:
            moves += [_move(kind, [], [name], old, new) for name in names]
        moves += [Move(f"{n} slower", kind, old[n], new[n], (n,)) for n in slower.get(kind, ())]
    return moves


def _grouped(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for name in names:
        groups[class_of(name)].append(name)
    return groups


def _move(
    kind: str, gone: Sequence[str], come: Sequence[str], old: Mapping[str, float], new: Mapping[str, float]
) -> Move:
    before, after = sorted(gone, key=lambda n: -old[n]), sorted(come, key=lambda n: -new[n])
    what = f"{_listed(before)} replaced by {_listed(after)}" if before else f"{_listed(after)} new"
    names = (*before, *after)
    base_ms = sum(old[n] for n in {*names} & {*old})
    return Move(what, kind, base_ms, sum(new[n] for n in after), names)


def _in_pieces(moves: list[Move], gone: Sequence[str], old: Mapping[str, float]) -> list[Move]:
    """Join moves of classes that do in pieces what kernels of another class did that went and left no successor."""
    for kind, pieces in _MAY_REPLACE.items():
        lost = [name for name in gone if class_of(name) == kind]
        lost_ms = sum(old[name] for name in lost)
        if not lost or any(move.kind == kind for move in moves):
            continue
        parts = [move for move in moves if move.kind in pieces and move.delta_ms > 0.0]
        softmax = any("softmax" in name for move in parts for name in move.names)
        if not parts or (kind == "attention" and not softmax):
            continue
        names = [name for move in parts for name in move.names]
        base_ms, head_ms = lost_ms + sum(m.base_ms for m in parts), sum(m.head_ms for m in parts)
        what = f"{_listed(lost)} replaced by {_listed(names)}"
        moves = [m for m in moves if m not in parts] + [Move(what, kind, base_ms, head_ms, (*lost, *names))]
    return moves


def _by_class(moves: list[Move]) -> list[Move]:
    """Join kernels of one class that got slower where they are many: a dozen products of different tile sizes."""
    single: dict[str, list[Move]] = collections.defaultdict(list)
    for move in moves:
        if len(move.names) == 1 and move.delta_ms > 0.0 and move.base_ms > 0.0:
            single[move.kind].append(move)
    for kind, group in single.items():
        largest = max(group, key=lambda m: m.delta_ms)
        total = sum(m.delta_ms for m in group)
        if len(group) < _FEW or largest.delta_ms > total / 2.0 or kind == "other":
            continue
        names = tuple(name for m in sorted(group, key=lambda m: -m.delta_ms) for name in m.names)
        what = f"{len(group)} kernels of class {kind} slower, most of all {names[0]}"
        joined = Move(what, kind, sum(m.base_ms for m in group), sum(m.head_ms for m in group), names)
        moves = [m for m in moves if m not in group] + [joined]
    return moves


def _listed(names: Sequence[str]) -> str:
    """Return names for people, longest time first; an operator and its backward pass are one."""
    forward = {name.removesuffix(_BACKWARD): name for name in names}
    told = [
        f"{name} (and backward)" if {name, name + _BACKWARD} <= {*names} else last for name, last in forward.items()
    ]
    return " and ".join(told) if len(told) <= 2 else f"{told[0]} and {len(told) - 1} others"
