"""The largest batch that fits: peaks grow almost evenly with the batch, so two answers tell where to look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kernel_pytorch.errors import KptError
from kernel_pytorch.fit.build import Build
from kernel_pytorch.fit.outcome import Fit

__all__ = ["largest_batch"]

_MOST_ANSWERS = 12


def largest_batch(build: Build, ask: Callable[[Build], Fit], *, step: int = 1) -> Fit:
    """Return the answer of the largest batch that fits; every batch that is said to fit was asked for.

    Args:
        build: The program; its own batch is where the search begins.
        ask: Answers for one batch.
        step: Batches are multiples of it.

    Raises:
        KptError: Not even the smallest batch fits, or the device's memory is not known.
    """
    known: dict[int, Fit] = {}

    def at(size: int) -> Fit:
        if size not in known:
            known[size] = ask(replace(build, batch=size))
        return known[size]

    first = ask(build)
    if first.fits is None:
        raise KptError(f"the memory of {first.place} is not known, so no batch is the largest")
    if first.batch < 1:
        raise KptError("the inputs have no batch dimension")
    begin = max(first.batch // step * step, step)
    if begin == first.batch:
        known[begin] = first
    low, high = _bracket(begin, step, at)
    while high - low > step and len(known) < _MOST_ANSWERS:
        middle = _between(low, high, step, known)
        if at(middle).fits:
            low = middle
        else:
            high = middle
    found = known[low]
    exact = high - low <= step
    note = f"batch {low} fits and batch {high} does not" + ("" if exact else "; what lies between was not asked")
    return replace(found, notes=(*found.notes, f"{note} ({len(known)} answers)"))


def _bracket(begin: int, step: int, at: Callable[[int], Fit]) -> tuple[int, int]:
    """Return a batch that fits and a larger one that does not."""
    low, size = 0, begin
    while at(size).fits:
        low, size = size, size * 2
    if low:
        return low, size
    high = size
    while size > step:
        size = max(size // 2 // step * step, step)
        if at(size).fits:
            return size, high
        high = size
    raise KptError(f"not even a batch of {step} fits: {at(step).message.splitlines()[0] if at(step).message else ''}")


def _between(low: int, high: int, step: int, known: dict[int, Fit]) -> int:
    """Return where the line through the two largest peaks meets the memory, kept away from both ends."""
    fitting = sorted(size for size, fit in known.items() if fit.fits)
    guess = (low + high) // 2
    if len(fitting) >= 2:
        one, two = fitting[-2], fitting[-1]
        slope = (known[two].peak_bytes - known[one].peak_bytes) / (two - one)
        if slope > 0:
            guess = int(two + (known[two].capacity_bytes - known[two].peak_bytes) / slope)
    guess = guess // step * step
    return min(max(guess, low + step), high - step)
