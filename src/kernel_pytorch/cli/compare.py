"""`kpt compare`: two revisions, environments, targets, commands or series."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_pytorch.cli.output import quiet_stdout, stderr_console
from kernel_pytorch.cli.verdict import check_places, conclude, keep, keep_interrupted
from kernel_pytorch.core.types import Verdict
from kernel_pytorch.errors import KptError

if TYPE_CHECKING:
    from kernel_pytorch.core.types import Event
    from kernel_pytorch.guard.side_by_side import Side
    from kernel_pytorch.guard.types import Comparison

__all__ = ["compare"]

_FORMS = (
    "give --base REV [--head REV], --base-python P [--head-python P], two targets, --command twice, or "
    "--base-samples F --head-samples F"
)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the options say."""

    targets: tuple[str, ...]
    commands: tuple[str, ...]
    base: str | None
    head: str | None
    base_python: str | None
    head_python: str | None
    base_samples: str | None
    head_samples: str | None
    paired: bool
    per_line: bool
    allow_dirty: bool
    other_model: bool
    bisect: bool
    first_parent: bool
    mode: str
    trust_remote_code: bool

    @property
    def series(self) -> bool:
        return self.base_samples is not None or self.head_samples is not None

    @property
    def revisions(self) -> bool:
        return self.base is not None or self.head is not None

    @property
    def pythons(self) -> bool:
        return self.base_python is not None or self.head_python is not None

    def check(self) -> None:
        """Refuse combinations that mean nothing.

        Raises:
            KptError: With what to give instead.
        """
        for wrong, message, fix in self._faults():
            if wrong:
                raise KptError(message, fix=fix)

    def _faults(self) -> Iterator[tuple[bool, str, str]]:
        run = bool(self.targets or self.commands)
        if self.series:
            missing = self.base_samples is None or self.head_samples is None
            yield missing, "series come in two", "give both --base-samples FILE and --head-samples FILE"
            others = run or self.revisions or self.pythons
            yield (
                others,
                "series were taken elsewhere, so nothing else can be run beside them",
                "give the two files only",
            )
            yield self.bisect, "--bisect runs revisions, and series are files", "give --base REV --head REV"
            return
        yield self.paired, "--paired is about series", "give --base-samples and --head-samples, or leave it out"
        yield not run, "nothing says what to run", f"give a TARGET or --command; {_FORMS}"
        yield bool(self.targets and self.commands), "a TARGET and a --command exclude each other", "give one of the two"
        yield len(self.commands) > 2, f"{len(self.commands)} commands; at most two can be compared", _FORMS
        yield self.per_line and not self.commands, "--per-line is about what a --command prints", "leave it out"
        two = len(self.targets) == 2 or len(self.commands) == 2
        fix = "name one TARGET (or --command) for both revisions"
        yield two and self.revisions, "two targets and two revisions: one difference at a time tells something", fix
        yield self.head is not None and self.base is None, "--head REV needs --base REV to compare with", "--base REV"
        yield self.bisect and not self.revisions, "--bisect walks git revisions", "give --base REV --head REV"
        yield self.allow_dirty and not self.revisions, "--allow-dirty is about revisions", "give --base REV"
        yield self.first_parent and not self.bisect, "--first-parent is about --bisect", "leave it out"
        yield not (two or self.revisions or self.pythons), "both sides are the same: nothing differs", _FORMS


def compare(
    *,
    budget: float,
    max_slowdown: float,
    name: str,
    history: str | None,
    inconclusive: str,
    form: str,
    output: str | None,
    **options: Any,
) -> int:
    """Judge two sides, record and print the verdict; return 1 where head is slower."""
    asked = _Asked(**options)
    asked.check()
    check_places(history, output)
    again = shlex.join(["kpt", *sys.argv[1:]])
    found: list[Comparison] = []
    if asked.series:
        found = _series(asked, max_slowdown=max_slowdown, name=name, command=again)
    else:
        from kernel_pytorch.guard.compare import InterruptedComparison

        with quiet_stdout(), _telling() as listen:
            run = _Runs(asked, max_slowdown, budget, name, again, listen)
            try:
                found = [run.once()]
                if asked.bisect:
                    found = [run.bisected(found[0], history)]
            except InterruptedComparison as stop:
                keep(found, history)
                keep_interrupted(stop.comparison, history)
                raise
            except BaseException:  # the walk takes longer than the comparison, which is not lost
                keep(found, history)
                raise
    keep(found, history)
    return conclude(found, form=form, output=output, inconclusive=inconclusive)


def _series(asked: _Asked, *, max_slowdown: float, name: str, command: str) -> list[Comparison]:
    from kernel_pytorch.guard.compare import compare_series

    assert asked.base_samples is not None
    assert asked.head_samples is not None
    files = (Path(asked.base_samples), Path(asked.head_samples))
    if any(map(_holds_results, files)):
        from kernel_pytorch.guard.importers import compare_results

        if asked.paired or name:
            option = "--paired" if asked.paired else "--name"
            raise KptError(
                f"{option} is about plain series; these are results of a benchmark tool, each with its own name",
                fix="leave it out",
            )
        return list(compare_results(*files, max_slowdown=max_slowdown, command=command))
    return [compare_series(*files, paired=asked.paired, max_slowdown=max_slowdown, name=name, command=command)]


def _holds_results(path: Path) -> bool:
    """Return whether a file is of pytest-benchmark or asv; one that cannot be read is refused as a series."""
    from kernel_pytorch.guard.importers import is_results
    from kernel_pytorch.guard.saved import ResultsError, load_json

    try:
        return is_results(load_json(path))
    except ResultsError:
        return False


@contextmanager
def _telling() -> Iterator[Any]:
    """Yield a listener that tells on stderr what is going on."""
    console = stderr_console()
    with console.status("comparing") as status:

        def listen(event: Event) -> None:
            if console.is_terminal:
                status.update(event.message)
            else:
                console.print(f"kpt: {event.message}", markup=False, soft_wrap=True)

        yield listen


@dataclass(frozen=True, slots=True)
class _Runs:
    """Comparisons of what was asked for, and of revisions between."""

    asked: _Asked
    max_slowdown: float
    budget_s: float
    name: str
    command: str
    listen: Any

    def once(self) -> Comparison:
        """Compare what was asked for."""
        if not self.asked.revisions:
            return self._sides(*self._plain_sides())
        assert self.asked.base is not None
        return self._revisions(self.asked.base, self.asked.head or "HEAD", allow_dirty=self.asked.allow_dirty)

    def bisected(self, found: Comparison, history: str | None) -> Comparison:
        """Walk the revisions between, where head is slower, and return the comparison with what was found."""
        from kernel_pytorch.guard.bisect import bisect
        from kernel_pytorch.guard.revisions import top_level

        if found.verdict is not Verdict.FAIL:
            told = f"not bisected: that needs a FAIL, and the verdict is {found.verdict}"
            return replace(found, notes=(*found.notes, told))
        if found.head.dirty:
            told = "not bisected: what head runs is no commit (uncommitted changes)"
            return replace(found, notes=(*found.notes, told))
        base = found.base.revision

        def judge(revision: str) -> Verdict:
            step = self._revisions(base, revision, allow_dirty=False, profile=False)
            keep([replace(step, name=f"{found.name} (bisect)")], history)
            return step.verdict

        walked = bisect(
            base, found.head.revision, top_level(), judge, first_parent=self.asked.first_parent, listen=self.listen
        )
        steps = tuple(
            f"bisect: {step.commit}: {step.verdict}" + (f" ({step.reason})" if step.reason else "")
            for step in walked.steps
        )
        known = walked.first_bad is not None
        others = tuple(one for one in found.culprits if not (known and one.kind == "revision"))
        return replace(found, culprits=(walked.culprit, *others), notes=(*found.notes, *steps))

    def _plain_sides(self) -> tuple[Side, Side]:
        from kernel_pytorch.guard.side_by_side import Side

        targets = (*self.asked.targets, *self.asked.targets)[:2]
        commands = [tuple(shlex.split(text)) for text in (*self.asked.commands, *self.asked.commands)[:2]]
        sides = []
        for i, label in enumerate(("base", "head")):
            what: dict[str, Any] = {"command": commands[i]} if commands else {"target": targets[i]}
            sides.append(Side(label, **what, **self._options()))
        return self._with_pythons(sides[0], sides[1])

    def _options(self) -> dict[str, Any]:
        asked = self.asked
        return {"mode": asked.mode, "per_line": asked.per_line, "trust_remote_code": asked.trust_remote_code}

    def _with_pythons(self, base: Side, head: Side) -> tuple[Side, Side]:
        if not self.asked.pythons:
            return base, head
        here = sys.executable
        return (
            replace(base, python=self.asked.base_python or here),
            replace(head, python=self.asked.head_python or here),
        )

    def _revisions(self, base: str, head: str, *, allow_dirty: bool, profile: bool = True) -> Comparison:
        from kernel_pytorch.guard.revisions import revision_sides

        target = self.asked.targets[0] if self.asked.targets else None
        command = tuple(shlex.split(self.asked.commands[0])) if self.asked.commands else None
        with revision_sides(
            base, head, target=target, command=command, allow_dirty=allow_dirty, **self._options()
        ) as sides:
            found = self._sides(*self._with_pythons(*sides), profile=profile)
        if found.base.revision == found.head.revision and not found.head.dirty and not self.asked.pythons:
            told = f"{base} and {head} are the same commit: what differs is noise"
            return replace(found, notes=(told, *found.notes))
        return found

    def _sides(self, base: Side, head: Side, *, profile: bool = True) -> Comparison:
        from kernel_pytorch.guard.compare import compare_sides

        return compare_sides(
            base,
            head,
            max_slowdown=self.max_slowdown,
            max_seconds=self.budget_s,
            name=self.name or self._name(),
            profile=profile,
            same_model=not self.asked.other_model,
            listen=self.listen,
            command=self.command,
        )

    def _name(self) -> str:
        """Return what is compared: a file's directory differs from machine to machine, and a history lasts."""
        if self.asked.commands:
            return " vs ".join(self.asked.commands)
        return " vs ".join(map(_label, self.asked.targets))


def _label(target: str) -> str:
    """Return what a target is called, as `load_target` calls it."""
    where, colon, factory = target.rpartition(":")
    if target.endswith(".pt2"):
        return Path(target).stem
    return f"{Path(where).stem}:{factory}" if colon and (where.endswith(".py") or "/" in where) else target
