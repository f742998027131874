"""Says what changed between the two sides of a comparison and may be why one is slower, most likely first.

The profiles tell *where* the time went: each move has a share of the slowdown. What can only tell *why* (a version, a
commit, a clock) is ranked by how well it fits that: a clock that fell explains a slowdown in which all kernels got
slower alike, a new cuDNN one in the convolutions, a commit one whose changed lines speak of what moved.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kernel_pytorch.core.types import Verdict
from kernel_pytorch.errors import KptError
from kernel_pytorch.guard.circumstances import Slowdown, Suspect, circumstances
from kernel_pytorch.guard.commits import Commit, commits_between, relevance
from kernel_pytorch.guard.kernel_moves import Move, Moves, compare_profiles
from kernel_pytorch.guard.revisions import git
from kernel_pytorch.guard.types import Comparison, Culprit, SideFacts
from kernel_pytorch.guard.versions import software_suspects

__all__ = ["find_culprits"]

_LEAST_SHARE = 0.05
_MOST_KERNELS = 6
_LEAST_IDLE = 0.2
_MOST_COMMITS = 5
_MOST_FILES = 3


def find_culprits(comparison: Comparison, *, repo: Path | None = None) -> tuple[Culprit, ...]:
    """Return what differs between the sides and may explain that head is slower, most likely first.

    Args:
        comparison: With the facts and the samples of both sides; its own culprits are ignored.
        repo: A directory of the git repository that the revisions are from; by default the current directory.

    Returns:
        Nothing where it passed or nothing was decided. Where it failed and nothing that was recorded differs, one of
        kind `unknown` that says so, and what was not recorded. Of a share, 1.0 is all time that was added: what some
        kernels gained does not make the share of others larger than that.
    """
    if comparison.verdict in (Verdict.PASS, Verdict.INCONCLUSIVE):
        return ()
    base, head = comparison.base, comparison.head
    timed = comparison.verdict is Verdict.FAIL
    slowdown_ms = _slowdown_ms(comparison)
    suspects: list[Suspect] = []
    shares: dict[str, float] = {}
    moved: tuple[str, ...] = ()
    profiled = bool(timed and base.kernels_ms and head.kernels_ms)
    if profiled:
        old_ms = statistics.median(comparison.base_samples_ms) if slowdown_ms is not None else 0.0
        new_ms = old_ms + (slowdown_ms or 0.0)
        moves = compare_profiles(base.kernels_ms, head.kernels_ms, base_ms=old_ms, head_ms=new_ms)
        suspects += _kernels(moves, slowdown_ms, old_ms, shares)
        moved = tuple(name for move in moves.slower[:_MOST_KERNELS] for name in move.names)
    fraction = comparison.change.value - 1.0 if timed and comparison.change is not None else 0.0
    slowdown = Slowdown(max(0.0, fraction), slowdown_ms, profiled, shares)
    if base.device_key and head.device_key and base.device_key != head.device_key:
        what = f"device {base.device_key} -> {head.device_key}"
        evidence = {"base_device": base.device_key, "head_device": head.device_key}
        suspects.append(Suspect(Culprit("device", what, None, evidence), 1.1))
    software = list(software_suspects(base, head, slowdown))
    suspects += software
    suspects += _revisions(base, head, shares | ({"software": 0.5} if software else {}), moved, repo or Path.cwd())
    if timed:
        suspects += circumstances(base, head, slowdown)
    if not suspects and comparison.verdict is Verdict.FAIL:
        return (_unknown(base, head),)
    return tuple(suspect.culprit for suspect in sorted(suspects, key=lambda suspect: -suspect.weight))


def _slowdown_ms(comparison: Comparison) -> float | None:
    if comparison.change is None or not comparison.base_samples_ms:
        return None
    return statistics.median(comparison.base_samples_ms) * (comparison.change.value - 1.0)


def _kernels(moves: Moves, slowdown_ms: float | None, old_ms: float, shares: dict[str, float]) -> Iterator[Suspect]:
    """Give the kernels that moved and the time between them; fill in their shares by class."""
    idle_ms = 0.0 if slowdown_ms is None or moves.whole else slowdown_ms - (moves.head_ms - moves.base_ms)
    alike_ms = moves.alike_ms if slowdown_ms is None else min(moves.alike_ms, max(0.0, slowdown_ms))
    added_ms = sum(move.delta_ms for move in moves.slower) + alike_ms + max(0.0, idle_ms)
    whole_ms = max(added_ms, slowdown_ms or 0.0, 1e-9)
    for move in moves.slower:
        shares[move.kind] = shares.get(move.kind, 0.0) + move.delta_ms / whole_ms
    shares["alike"] = alike_ms / whole_ms
    shares["idle"] = shares.get("idle", 0.0) + max(0.0, idle_ms) / whole_ms
    if shares["alike"] >= _LEAST_SHARE:
        what = f"all kernels slower alike, by {100.0 * (moves.alike - 1.0):.1f} %"
        yield _timed(what + ": the device, not one of them", alike_ms, shares["alike"], {"factor": moves.alike})
    for move in moves.slower[:_MOST_KERNELS]:
        share = move.delta_ms / whole_ms
        if share >= _LEAST_SHARE:
            kind = "idle" if move.kind == "idle" else "kernels"
            what = "outside all operators (Python, data, waiting)" if kind == "idle" else move.what
            yield _timed(what, move.delta_ms, share, _figures(move), kind=kind)
    if idle_ms > 0.0 and idle_ms / whole_ms >= _LEAST_IDLE:
        evidence = {"base_ms": old_ms - moves.base_ms, "head_ms": old_ms - moves.base_ms + idle_ms}
        yield _timed("between kernels (launches, waits, Python)", idle_ms, idle_ms / whole_ms, evidence, kind="idle")


def _figures(move: Move) -> dict[str, float | str]:
    named = "\n".join(move.names[:12]) + ("\n..." if len(move.names) > 12 else "")
    return {"base_ms": move.base_ms, "head_ms": move.head_ms, "class": move.kind, "kernels": named}


def _timed(
    what: str, ms: float, share: float, evidence: Mapping[str, float | str], *, kind: str = "kernels"
) -> Suspect:
    told = f"{what}: +{_ms(ms)} ms ({100.0 * share:.0f} % of the slowdown)"
    return Suspect(Culprit(kind, told, share, {"delta_ms": ms, **evidence}), share)


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 1.0 else f"{value:.2f}" if value < 10.0 else f"{value:.1f}"


def _revisions(
    base: SideFacts, head: SideFacts, shares: Mapping[str, float], moved: Sequence[str], repo: Path
) -> Iterator[Suspect]:
    if head.dirty != base.dirty or (head.dirty and head.revision != base.revision):
        sides = " and ".join(side.label for side in (base, head) if side.dirty)
        files = _uncommitted(repo, head.revision) if head.dirty else ()
        what = f"changes that no commit holds on {sides}" + (f": {_listed(files)}" if files else "")
        yield Suspect(Culprit("revision", what, None, {"files": "\n".join(files)}), 0.6 if head.dirty else 0.2)
    if not base.revision or not head.revision or base.revision == head.revision:
        return
    span = {"base_revision": base.revision, "head_revision": head.revision}
    try:
        commits = commits_between(repo, base.revision, head.revision)
        missing = commits_between(repo, head.revision, base.revision)
        scores = _scores(repo, commits, shares, moved)
    except KptError as error:
        what = f"revision {base.revision[:10]} -> {head.revision[:10]}; its commits could not be read: {error}"
        yield Suspect(Culprit("revision", what, None, span), 0.45)
        return
    ranked = sorted(range(len(commits)), key=lambda i: -scores[i])
    told = [i for i in ranked if scores[i] > 0.0][:_MOST_COMMITS] or ranked[:1]
    for place, i in enumerate(told):
        commit = commits[i]
        what = f"commit {commit}" + (f" ({_listed(commit.files)})" if commit.files else "")
        evidence = {**span, "commit": commit.revision, "author": commit.author, "files": "\n".join(commit.files)}
        yield Suspect(Culprit("revision", what, None, evidence), _commit_weight(scores[i], place, len(commits)))
    if len(commits) > len(told):
        what = f"{len(commits) - len(told)} more commits from {base.revision[:10]} to {head.revision[:10]}"
        yield Suspect(Culprit("revision", f"{what}; --bisect tells which one it is", None, span), 0.08)
    if missing:
        what = f"{len(missing)} commits of base that head does not have, last {missing[0]}"
        yield Suspect(Culprit("revision", what, None, span), 0.3 if not commits else 0.25)


def _commit_weight(score: float, place: int, commits: int) -> float:
    if score <= 0.0:
        return 0.02
    return (0.62 if commits == 1 else 0.35 + 0.25 * min(1.0, score)) - 0.03 * place


def _scores(repo: Path, commits: Sequence[Commit], shares: Mapping[str, float], moved: Sequence[str]) -> list[float]:
    names = [name.rpartition("::")[2].removesuffix(" backward").strip("_") for name in moved]
    return [relevance(repo, commit, shares, names) for commit in commits[:60]] + [0.05] * max(0, len(commits) - 60)


def _uncommitted(repo: Path, revision: str) -> tuple[str, ...]:
    try:
        if git(repo, "rev-parse", "HEAD").strip() != revision:
            return ()
        return tuple(git(repo, "diff", "--name-only", "HEAD").splitlines())
    except KptError:
        return ()


def _listed(files: Sequence[str]) -> str:
    more = len(files) - _MOST_FILES
    return ", ".join(files[:_MOST_FILES]) + (f" and {more} more" if more > 0 else "")


def _unknown(base: SideFacts, head: SideFacts) -> Culprit:
    """Return the culprit that says that none is known, what was compared, and what could not be."""
    told = {
        "software": bool(base.software and head.software),
        "revision": bool(base.revision and head.revision),
        "clocks and load": bool(base.telemetry and head.telemetry),
        "memory": base.peak_bytes is not None and head.peak_bytes is not None,
        "kernels": bool(base.kernels_ms and head.kernels_ms),
    }
    same = ", ".join(name for name, known in told.items() if known)
    lacking = ", ".join(name for name, known in told.items() if not known)
    if not same:
        return Culprit(
            "unknown", "nothing is known of the two sides but their samples", None, {"not_recorded": lacking}
        )
    what = f"nothing that was recorded differs between the sides beyond noise: {same}"
    if lacking:
        what += f"; not recorded: {lacking}"
    return Culprit("unknown", what, None, {"compared": same, "not_recorded": lacking})
