"""Finds the commit that made it slow: halves what lies between a good and a bad revision, on any history.

Which commit to judge next is git's own choice (`git rev-list --bisect-all`): the one that leaves the fewest in either
case, merges or not. Nothing is checked out here; how a revision is judged is the caller's.
"""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel_pytorch.core.types import Event, Listener, Verdict
from kernel_pytorch.errors import KptError
from kernel_pytorch.guard.commits import Commit, list_commits, read_commit
from kernel_pytorch.guard.revisions import commit_of, git, top_level
from kernel_pytorch.guard.types import Culprit

__all__ = ["Bisection", "Judged", "bisect"]

_MOST_LISTED = 5


@dataclass(frozen=True, slots=True)
class Judged:
    """One step of a bisection.

    Attributes:
        commit: The commit that was judged.
        verdict: `PASS` is good, `FAIL` is bad, all else is skipped.
        reason: Why it was skipped, where that is known.
        left: Commits among which the first bad one still is, after this step.
    """

    commit: Commit
    verdict: Verdict
    reason: str
    left: int


@dataclass(frozen=True, slots=True)
class Bisection:
    """What a bisection found.

    Attributes:
        first_bad: The first slow commit; `None` where it could not be told.
        remaining: Commits one of which is the first slow one, newest first: that one alone where it was found.
        reason: The outcome in one sentence.
        steps: What was judged, in order.
    """

    first_bad: Commit | None
    remaining: tuple[Commit, ...]
    reason: str
    steps: tuple[Judged, ...]

    @property
    def culprit(self) -> Culprit:
        """The outcome as a culprit of a comparison."""
        evidence: dict[str, float | str] = {"judged": float(len(self.steps))}
        if self.first_bad is not None:
            evidence |= {"commit": self.first_bad.revision, "author": self.first_bad.author}
            evidence["files"] = "\n".join(self.first_bad.files)
        return Culprit("revision", self.reason, None, evidence)


def bisect(
    good: str,
    bad: str,
    repo: Path,
    judge: Callable[[str], Verdict],
    *,
    first_parent: bool = False,
    max_comparisons: int = 40,
    listen: Listener | None = None,
) -> Bisection:
    """Find the first slow commit between two revisions.

    That good is fast and bad is slow is taken as known. Where good is no ancestor of bad, their merge base is judged
    first, since a commit of good's own branch may be what makes good fast.

    Args:
        good: A revision that is fast.
        bad: A revision that is slow.
        repo: A directory in their repository.
        judge: Compares a commit (full hash) with the good one. `FAIL`: it is slow. `PASS`: it is fast. Another
            verdict, or a `KptError` or an error of the operating system (it does not build, does not start), skips it.
        first_parent: Follow only the first parent of merges: finds the merge that made it slow, not the commit in
            its branch.
        max_comparisons: Commits that are judged at most.
        listen: Called with an `Event` of kind `note` for each step.

    Raises:
        KptError: A revision is unknown, both are the same commit, or bad is an ancestor of good.
    """
    repo = top_level(repo)
    old, new = commit_of(good, repo), commit_of(bad, repo)
    if old == new:
        raise KptError(f"good ({good}) and bad ({bad}) are the same commit {old[:10]}", fix="give two revisions")
    bases = _merge_bases(repo, old, new)
    if new in bases:
        raise KptError(
            f"bad ({bad}) is an ancestor of good ({good}): the slow revision must be the newer one",
            fix="swap the two; a slowdown that was mended since is no regression",
        )
    walk = _Walk(repo, judge, first_parent=first_parent, most=max_comparisons, listen=listen, bad=new, good=[old])
    if old not in bases:
        for base in bases:
            if walk.judge(base) is Verdict.FAIL:
                reason = (
                    f"{base[:10]}, where the histories of {good} and {bad} part, is slow already: "
                    f"what makes {good} fast is in its own branch, and {bad} lacks it"
                )
                return Bisection(None, (), reason, tuple(walk.steps))
    return walk.to_the_end()


def _merge_bases(repo: Path, old: str, new: str) -> list[str]:
    try:
        return git(repo, "merge-base", "--all", old, new).split()
    except KptError as error:
        message = f"{old[:10]} and {new[:10]} have no common ancestor in {repo}, or the clone is too shallow to see it"
        raise KptError(message, fix="git fetch --unshallow") from error


class _Walk:
    """The state of a bisection: bounds, and what was skipped."""

    def __init__(
        self,
        repo: Path,
        judge: Callable[[str], Verdict],
        *,
        first_parent: bool,
        most: int,
        listen: Listener | None,
        bad: str,
        good: list[str],
    ) -> None:
        self.repo, self._judge, self._most, self._listen = repo, judge, most, listen
        self._options = ("--first-parent",) if first_parent else ()
        self.bad, self.good = bad, good
        self.skipped: dict[str, str] = {}
        self.steps: list[Judged] = []

    def to_the_end(self) -> Bisection:
        """Judge commits until one is left, all that are left were skipped, or the budget is spent."""
        while True:
            distances = self._distances()
            if list(distances) == [self.bad]:
                found = read_commit(self.repo, self.bad)
                return Bisection(found, (found,), f"the first slow commit is {found}", tuple(self.steps))
            open_ones = [one for one in distances if one not in self.skipped and one != self.bad]
            if not open_ones or len(self.steps) >= self._most:
                return self._unfinished(spent=bool(open_ones))
            self.judge(self._next(open_ones, distances))

    def judge(self, revision: str) -> Verdict:
        """Judge one commit and move the bounds."""
        why = ""
        try:
            verdict = Verdict(self._judge(revision))
        except (KptError, OSError, subprocess.SubprocessError) as error:
            verdict, why = Verdict.INCONCLUSIVE, f"{type(error).__name__}: {error}"
        if verdict is Verdict.FAIL:
            self.bad = revision
        elif verdict is Verdict.PASS:
            self.good.append(revision)
        else:
            self.skipped[revision] = why or f"verdict {verdict}"
        commit, left = read_commit(self.repo, revision), len(self._distances())
        self.steps.append(Judged(commit, verdict, self.skipped.get(revision, ""), left))
        if self._listen is not None:
            outcome = {Verdict.FAIL: "slow", Verdict.PASS: "fast"}.get(
                verdict, f"skipped ({self.skipped.get(revision)})"
            )
            steps = math.ceil(math.log2(left)) if left else 0
            more = f"; {left} left, about {steps} more comparison{'s' * (steps != 1)}" if steps else ""
            self._listen(Event("note", f"bisect: {commit} is {outcome}{more}"))
        return verdict

    @property
    def _span(self) -> list[str]:
        return [*self._options, self.bad, *(f"^{one}" for one in self.good)]

    def _distances(self) -> dict[str, int]:
        """Return the commits that may be the first slow one, best to judge first, with how many each decides on."""
        told = git(self.repo, "rev-list", "--bisect-all", *self._span).splitlines()
        lines = (re.match(r"(\w+) .*dist=(\d+)", line) for line in told)
        return {line[1]: int(line[2]) for line in lines if line is not None}

    def _next(self, open_ones: Sequence[str], distances: Mapping[str, int]) -> str:
        """Return the commit to judge: the one that halves best, but not beside one that was skipped.

        What does not build seldom builds again in the next commit.
        """
        order = git(self.repo, "rev-list", "--topo-order", *self._span).splitlines()
        place = {one: i for i, one in enumerate(order)}
        broken = [place[one] for one in self.skipped if one in place]
        if not broken:
            return open_ones[0]
        return max(open_ones, key=lambda one: distances[one] * math.sqrt(min(abs(place[one] - at) for at in broken)))

    def _unfinished(self, *, spent: bool) -> Bisection:
        left = list_commits(self.repo, "--topo-order", *self._span)
        missed = [(one, self.skipped[one.revision]) for one in left if one.revision in self.skipped]
        why = f"the budget of {self._most} comparisons is spent"
        if not spent:
            why = f"{len(missed)} of them could not be judged ({missed[0][0].revision[:10]}: {missed[0][1]})"
        named = "; ".join(map(str, left[:_MOST_LISTED])) + ("; ..." if len(left) > _MOST_LISTED else "")
        reason = f"the first slow commit is one of {len(left)}, since {why}: {named}"
        return Bisection(None, left, reason, tuple(self.steps))
