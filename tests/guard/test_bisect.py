"""Bisection over real repositories: the first slow commit is found, or what is left is told."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from kernel_pytorch.core.types import Event, Verdict
from kernel_pytorch.errors import KptError
from kernel_pytorch.guard.bisect import bisect
from tests.guard.repositories import Repository


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "repo")


class Judge:
    """Says how fast a revision is by the file `speed` in it, and remembers what it was asked."""

    def __init__(self, repository: Repository, **verdicts: Verdict | Exception) -> None:
        self.repository, self.special, self.asked = repository, verdicts, []

    def __call__(self, revision: str) -> Verdict:
        self.asked.append(revision)
        outcome = self.special.get(self.repository.git("log", "-1", "--format=%s", revision).replace(" ", "_"))
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is not None:
            return outcome
        return {"fast": Verdict.PASS, "slow": Verdict.FAIL}[self.repository.text_at(revision, "speed")]


def linear(repository: Repository, commits: int, slow_from: int) -> list[str]:
    made = []
    for i in range(commits):
        speed = "slow" if i >= slow_from else "fast"
        made.append(repository.commit(f"change {i}", speed=speed, count_txt=str(i)))
    return made


@pytest.mark.parametrize("slow_from", [1, 2, 7, 18, 19])
def test_a_linear_history_is_halved(repository: Repository, slow_from: int) -> None:
    made = linear(repository, 20, slow_from)
    judge = Judge(repository)
    found = bisect(made[0], "main", repository.path, judge)
    assert found.first_bad is not None
    assert found.first_bad.revision == made[slow_from]
    assert found.first_bad.subject == f"change {slow_from}"
    assert found.first_bad.author == "Ada Byron"
    assert "speed" in found.first_bad.files
    assert f"change {slow_from}" in found.reason
    assert "Ada Byron" in found.reason
    assert found.remaining == (found.first_bad,)
    assert len(judge.asked) <= math.ceil(math.log2(19))
    assert [step.commit.revision for step in found.steps] == judge.asked
    assert found.culprit.kind == "revision"
    assert made[slow_from] == found.culprit.evidence["commit"]


def test_neighbours_need_no_comparison(repository: Repository) -> None:
    made = linear(repository, 2, 1)
    judge = Judge(repository)
    found = bisect(made[0], made[1], repository.path, judge)
    assert found.first_bad is not None
    assert found.first_bad.revision == made[1]
    assert judge.asked == []


def merged(repository: Repository) -> tuple[str, str, str]:
    """Return the first commit, the slow one inside a merged branch, and the merge."""
    first = repository.commit("start", speed="fast")
    repository.git("switch", "-q", "-c", "feature")
    repository.commit("feature a", a="1")
    slow = repository.commit("feature b", speed="slow")
    repository.commit("feature c", c="1")
    repository.git("switch", "-q", "main")
    for i in range(3):
        repository.commit(f"main {i}", main=str(i))
    repository.git("merge", "-q", "--no-ff", "-m", "merge the feature", "feature")
    merge = repository.git("rev-parse", "HEAD")
    for i in range(3, 6):
        repository.commit(f"main {i}", main=str(i))
    return first, slow, merge


def test_the_commit_inside_a_merged_branch_is_found(repository: Repository) -> None:
    first, slow, _ = merged(repository)
    found = bisect(first, "main", repository.path, Judge(repository))
    assert found.first_bad is not None
    assert found.first_bad.revision == slow


def test_first_parent_finds_the_merge(repository: Repository) -> None:
    first, slow, merge = merged(repository)
    judge = Judge(repository)
    found = bisect(first, "main", repository.path, judge, first_parent=True)
    assert found.first_bad is not None
    assert found.first_bad.revision == merge
    assert "speed" in found.first_bad.files, "what the merge brought in"
    assert slow not in judge.asked


def test_a_merge_of_two_fast_branches_can_be_the_first_slow_one(repository: Repository) -> None:
    first = repository.commit("start", speed="fast")
    repository.git("switch", "-q", "-c", "feature")
    repository.commit("feature", a="1")
    repository.git("switch", "-q", "main")
    repository.commit("main", b="1")
    repository.git("merge", "-q", "--no-ff", "--no-commit", "feature")
    merge = repository.commit("merge", speed="slow")
    repository.commit("later", d="1")
    found = bisect(first, "main", repository.path, Judge(repository))
    assert found.first_bad is not None
    assert found.first_bad.revision == merge


def test_what_does_not_build_or_does_not_decide_is_skipped(repository: Repository) -> None:
    made = linear(repository, 20, 13)
    judge = Judge(
        repository,
        change_9=KptError("target model.py:make: no such function"),
        change_10=Verdict.INCONCLUSIVE,
        change_5=OSError("no space left on device"),
    )
    found = bisect(made[0], made[-1], repository.path, judge)
    assert found.first_bad is not None
    assert found.first_bad.revision == made[13]
    skipped = [step for step in found.steps if step.verdict is Verdict.INCONCLUSIVE]
    assert skipped, "one of them is in the middle"
    assert any("no such function" in step.reason or "INCONCLUSIVE" in step.reason for step in skipped)


@pytest.mark.parametrize("verdict", [Verdict.WRONG, Verdict.STALE])
def test_other_verdicts_are_no_time(repository: Repository, verdict: Verdict) -> None:
    made = linear(repository, 8, 6)
    found = bisect(made[0], made[-1], repository.path, Judge(repository, change_4=verdict, change_3=verdict))
    assert found.first_bad is not None
    assert found.first_bad.revision == made[6]


def test_skips_beside_the_first_slow_commit_leave_a_range(repository: Repository) -> None:
    made = linear(repository, 12, 6)
    judge = Judge(repository, change_5=KptError("does not build"), change_6=Verdict.INCONCLUSIVE)
    found = bisect(made[0], made[-1], repository.path, judge)
    assert found.first_bad is None
    assert [commit.revision for commit in found.remaining] == [made[7], made[6], made[5]]
    assert "one of 3" in found.reason
    assert "2 of them could not be judged" in found.reason
    assert found.culprit.share is None


def test_a_broken_stretch_is_left_quickly(repository: Repository) -> None:
    made = linear(repository, 64, 50)
    broken = {f"change_{i}": KptError("does not build") for i in range(22, 44)}
    judge = Judge(repository, **broken)
    found = bisect(made[0], made[-1], repository.path, judge)
    assert found.first_bad is not None
    assert found.first_bad.revision == made[50]
    assert sum(step.verdict is Verdict.INCONCLUSIVE for step in found.steps) <= 3
    assert len(judge.asked) <= 10


def test_the_budget_is_kept(repository: Repository) -> None:
    made = linear(repository, 40, 20)
    judge = Judge(repository)
    found = bisect(made[0], made[-1], repository.path, judge, max_comparisons=3)
    assert len(judge.asked) == 3
    assert found.first_bad is None
    assert made[20] in [commit.revision for commit in found.remaining]
    assert len(found.remaining) == found.steps[-1].left < 8
    assert "budget of 3 comparisons" in found.reason


def test_each_step_is_told(repository: Repository) -> None:
    made = linear(repository, 9, 4)
    told: list[Event] = []
    found = bisect(made[0], made[-1], repository.path, Judge(repository), listen=told.append)
    assert len(told) == len(found.steps) >= 3
    assert all(event.kind == "note" for event in told)
    assert " is slow; " in " ".join(event.message for event in told)
    assert [step.left for step in found.steps] == sorted((s.left for s in found.steps), reverse=True)
    assert found.steps[-1].left == 1


def test_unknown_revisions_are_refused(repository: Repository, tmp_path: Path) -> None:
    made = linear(repository, 3, 1)
    judge = Judge(repository)
    with pytest.raises(KptError, match="unknown revision 'nowhere'"):
        bisect("nowhere", made[-1], repository.path, judge)
    with pytest.raises(KptError, match="unknown revision '--all'"):
        bisect(made[0], "--all", repository.path, judge)
    outside = tmp_path / "outside"
    outside.mkdir()
    with pytest.raises(KptError, match="is in no git checkout"):
        bisect(made[0], made[1], outside, judge)
    assert judge.asked == []


def test_the_same_commit_twice_and_the_wrong_order_are_refused(repository: Repository) -> None:
    made = linear(repository, 5, 3)
    with pytest.raises(KptError, match="the same commit"):
        bisect("main", made[-1], repository.path, Judge(repository))
    with pytest.raises(KptError, match="ancestor of good") as refused:
        bisect(made[-1], made[0], repository.path, Judge(repository))
    assert "swap" in refused.value.fix


def test_of_a_shallow_clone_it_is_said(repository: Repository, tmp_path: Path) -> None:
    made = linear(repository, 5, 3)
    repository.git("clone", "-q", "--depth", "2", f"file://{repository.path}", str(tmp_path / "clone"))
    with pytest.raises(KptError, match="unknown revision") as refused:
        bisect(made[0], made[-1], tmp_path / "clone", Judge(repository))
    assert "unshallow" in refused.value.fix


def diverged(repository: Repository, *, at_the_fork: str) -> tuple[str, str, str]:
    """Return a fast branch, a slow one, and the slow one's second commit."""
    repository.commit("start", speed=at_the_fork)
    repository.git("switch", "-q", "-c", "fast")
    good = repository.commit("mended", speed="fast", other="1")
    repository.git("switch", "-q", "main")
    repository.commit("main 0", main="0")
    slow = repository.commit("main 1", speed="slow", main="1")
    repository.commit("main 2", main="2")
    return good, repository.git("rev-parse", "HEAD"), slow


def test_branches_that_parted_are_judged_from_where_they_did(repository: Repository) -> None:
    good, bad, slow = diverged(repository, at_the_fork="fast")
    found = bisect(good, bad, repository.path, Judge(repository))
    assert found.first_bad is not None
    assert found.first_bad.revision == slow


def test_a_mend_on_the_good_branch_alone_is_no_regression_of_the_other(repository: Repository) -> None:
    good, bad, _ = diverged(repository, at_the_fork="slow")
    judge = Judge(repository)
    found = bisect(good, bad, repository.path, judge)
    assert found.first_bad is None
    assert "is slow already" in found.reason
    assert len(judge.asked) == 1


def test_a_git_hook_does_not_lead_it_elsewhere(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = linear(repository, 4, 2)
    elsewhere = Repository(tmp_path / "elsewhere")
    monkeypatch.setenv("GIT_DIR", str(elsewhere.path / ".git"))
    found = bisect(made[0], made[-1], repository.path, Judge(repository))
    assert found.first_bad is not None
    assert found.first_bad.revision == made[2]


def test_nothing_is_checked_out(repository: Repository) -> None:
    made = linear(repository, 6, 3)
    (repository.path / "speed").write_text("being edited")
    bisect(made[0], made[-1], repository.path, Judge(repository))
    assert repository.git("rev-parse", "HEAD") == made[-1]
    assert (repository.path / "speed").read_text() == "being edited"
