"""The cheapest set of memory patterns that fits, or the smallest that costs little, by the TPU compiler's word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kernel_pytorch.backends.tpu.ahead import call_on_device
from kernel_pytorch.backends.tpu.topology import Topology
from kernel_pytorch.core.types import Candidate, Step
from kernel_pytorch.errors import KptError
from kernel_pytorch.fit.build import Build
from kernel_pytorch.fit.outcome import Fit
from kernel_pytorch.fit.survey import Option, Survey, survey
from kernel_pytorch.fit.tpu import fit_tpu

__all__ = ["Searched", "Tried", "search_patterns"]

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Tried:
    """One set of patterns and what the compiler said of it.

    Attributes:
        fit: `None` where it could not be compiled; `reason` says why.
        extra_flops: Operations over the unmodified step's, as a fraction of them.
    """

    candidate: Candidate
    fit: Fit | None
    extra_flops: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search over memory patterns found.

    Attributes:
        chosen: The set to take; `None` where none reaches the goal.
        tried: In the order they were compiled, the unmodified step first.
        survey: What could have been tried.
        goal: In words.
    """

    chosen: Tried | None
    tried: tuple[Tried, ...]
    survey: Survey
    goal: str


def search_patterns(
    build: Build,
    topology: Topology,
    *,
    memory_bytes: int | None = None,
    max_extra_flops: float = 0.15,
    name: str = "",
    tell: Tell = lambda _: None,
) -> Searched:
    """Search the sets of memory patterns of a program.

    Args:
        build: The unmodified program. On a slice of several chips its batch is the global one.
        topology: The slice.
        memory_bytes: Take the set with the fewest operations whose peak on one device is at most this, and what the
            compiler sets aside for it too. `None`: take the smallest peak.
        max_extra_flops: Operations allowed over the unmodified step's, as a fraction, by PyTorch's own count.
        name: Of the target.
        tell: Called with a line for people.

    Raises:
        KptError: The program cannot be traced, or the compiler is missing.
    """
    if not max_extra_flops >= 0.0:
        raise KptError(f"operations allowed over the unmodified step's must be 0 or more, got {max_extra_flops}")
    spread = topology.devices > 1
    tell("unmodified")
    base = _compiled(build, topology, name)
    flops = base.fit.flops if base.fit is not None else 0
    tell("which patterns apply")
    found: Survey = call_on_device(_survey, build, spread, flops)
    tried = [base]
    goal = _goal(memory_bytes, max_extra_flops)
    if memory_bytes is not None and _reaches(tried[0], memory_bytes):
        return Searched(tried[0], tuple(tried), found, goal)

    def reaches(option: Option) -> bool:
        extra = option.flops / found.flops - 1.0
        tell(f"{option.candidate} ({extra:+.1%} operations)")
        again = _compiled(replace(build, candidate=option.candidate), topology, name)
        if again.fit is not None:
            extra = again.fit.flops / found.flops - 1.0  # on a slice the last block is not left plain
        tried.append(replace(again, extra_flops=extra))
        return memory_bytes is not None and _reaches(tried[-1], memory_bytes)

    options = _order(found, max_extra_flops, smallest=memory_bytes is None, spread=spread)
    if memory_bytes is None:
        for option in options:
            reaches(option)
    else:
        _first(options, reaches)
        if spread and not any(_reaches(t, memory_bytes) for t in tried):
            _first([replace(o, candidate=_whole(o.candidate)) for o in options], reaches)
    looped = _as_loop(options, _best(tried, memory_bytes))
    if looped is not None:
        reaches(looped)
    return Searched(_best(tried, memory_bytes), tuple(tried), found, goal)


def _as_loop(options: list[Option], best: Tried | None) -> Option | None:
    """Return the best set with its blocks as one loop, or where none fits the one with the smallest peak."""
    option = next((o for o in options if best is not None and o.candidate == best.candidate), None)
    if option is None and options and best is None:
        option = options[-1]
    return replace(option, candidate=option.loop) if option is not None and option.loop is not None else None


def _first(options: list[Option], reaches: Callable[[Option], bool]) -> None:
    """Ask by bisection for the first option that reaches the goal: with more operations comes a smaller peak."""
    if not options or not reaches(options[-1]):
        return
    low, high = 0, len(options) - 1
    while low < high:
        middle = (low + high) // 2
        if reaches(options[middle]):
            high = middle
        else:
            low = middle + 1


def _survey(build: Build, partitioned: bool, known: int) -> Survey:  # noqa: FBT001
    return survey(build, partitioned=partitioned, known=known)


def _goal(memory_bytes: int | None, most: float) -> str:
    if memory_bytes is None:
        return f"the smallest peak at no more than {most:.0%} more operations"
    return f"the fewest operations with a peak of at most {memory_bytes / 1e9:.2f} GB, and at most {most:.0%} more"


def _order(found: Survey, most: float, *, smallest: bool, spread: bool) -> list[Option]:
    """Return what to compile: all sets from the cheapest on, or for the smallest peak those likely to have it."""
    allowed = [o for o in found.options if o.flops <= found.flops * (1.0 + most)]
    if smallest:
        # Of the sets that recompute, the one that keeps least holds least; the best without, for comparison.
        recomputing = [o for o in allowed if o.kept_bytes is not None]
        whole = [o for o in allowed if o.kept_bytes is None]
        allowed = [*whole[-1:], *sorted(recomputing, key=lambda o: o.kept_bytes or 0)[:1]]
    if not spread:
        return allowed
    return [replace(o, candidate=_spread(o.candidate, found.block)) for o in allowed]


def _spread(candidate: Candidate, block: str) -> Candidate:
    """Return a candidate's steps for a step that lies on several devices, and the step that lays it there."""
    steps = []
    for step in candidate.steps:
        params = dict(step.params)
        if step.transform in ("chunked_loss", "recompute"):
            params["spread"] = True
        if step.transform == "recompute":
            # What the last block keeps counts on every device, and a device's share of the rest is small.
            params["plain"] = 0
        steps.append(Step(step.transform, params))
    return Candidate((*steps, Step("shard", {"parameters": "sharded", "rows": block})))


def _whole(candidate: Candidate) -> Candidate:
    """Return a spread candidate whose products of gathered weights are not split into windows."""
    *others, shard = candidate.steps
    return Candidate((*others, Step(shard.transform, {**shard.params, "windows": False})))


def _compiled(build: Build, topology: Topology, name: str) -> Tried:
    try:
        return Tried(build.candidate, fit_tpu(build, topology, name=name), 0.0)
    except KptError as error:
        if not build.candidate.steps:
            raise
        return Tried(build.candidate, None, 0.0, str(error))


def _reaches(tried: Tried, memory_bytes: int) -> bool:
    if tried.fit is None or not tried.fit.fits:
        return False
    return max(tried.fit.peak_bytes, tried.fit.assigned_bytes) <= memory_bytes


def _best(tried: list[Tried], memory_bytes: int | None) -> Tried | None:
    """Return the set with the fewest operations that keeps to the memory; without a goal, the one that holds least."""
    fitting = [t for t in tried if t.fit is not None and t.fit.fits]
    if memory_bytes is None:
        return min(fitting, key=lambda t: t.fit.peak_bytes if t.fit else 0, default=None)
    fitting = [t for t in fitting if _reaches(t, memory_bytes)]
    return min(fitting, key=lambda t: (t.extra_flops, t.fit.peak_bytes if t.fit else 0), default=None)
