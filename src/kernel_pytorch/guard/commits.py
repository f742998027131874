"""Commits of a git repository: what lies between two revisions, and what it has to do with the time that moved."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kernel_pytorch.guard.revisions import commit_of, git

__all__ = ["Commit", "commits_between", "list_commits", "read_commit", "relevance"]

_MOST_READ = 200
_MOST_CHARACTERS = 400_000
_FORMAT = "%H%x1f%an%x1f%as%x1f%s"

_WORDS = {
    "attention": r"attention|attn|sdpa|scaled_dot_product|flash|softmax|mask|heads?\b",
    "matmul": r"linear|matmul|\bb?mm\b|addmm|einsum|gemm| @ |proj|allow_tf32|float32_matmul_precision",
    "copy": r"\.to\(|contiguous|clone|copy|\bcat\b|concat|stack|\.float\(|\.half\(|bfloat16|dtype|\.cpu\(|\.cuda\("
    r"|permute|transpose|pad\(|autocast",
    "normalization": r"norm",
    "convolution": r"conv|channels_last|memory_format|cudnn",
    "optimizer": r"optim|adam|sgd|fused|foreach|\.step\(|lr\b|grad_norm",
    "embedding": r"embed|gather|scatter|index|lookup",
    "elementwise": r"gelu|silu|relu|tanh|sigmoid|dropout|activation|\bmul|\badd|\bexp|clamp|where",
    "reduction": r"softmax|\bsum|\bmean|\bloss|cross_entropy|\bmax|\bnorm|topk|sort|cumsum",
    "fused": r"compile|inductor|dynamo|triton|graph_break|disable",
    "communication": r"distributed|all_reduce|ddp|fsdp|nccl",
    "idle": r"\.item\(|\.cpu\(|\.tolist\(|\.numpy\(|synchronize|print\(|log(?:ger|ging)?\b|sleep|for .* in |num_workers"
    r"|DataLoader|compile|cuda_?graph|pin_memory|non_blocking",
    "memory": r"checkpoint|offload|retain|detach|no_grad|inference_mode|cache|append\(",
    "software": r"requirements|constraints|\.lock\b|pyproject|Dockerfile|environment\.ya?ml|==\d",
}
"""What the changed lines of a commit speak of where it has to do with a class of kernels."""
_IDLE_PATHS = re.compile(
    r"(^|/)(docs?|tests?|\.github|examples?)/|\.(md|rst|txt|png|svg|ipynb)$|(^|/)test_[^/]*$|LICENSE"
)
_PACKAGE_PATHS = re.compile(
    r"(requirements|constraints)[^/]*\.txt$|\.lock$|pyproject\.toml$|setup\.(py|cfg)$|Dockerfile"
)
_CODE = frozenset(
    {".py", ".pyx", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".hip", ".yaml", ".yml", ".json", ".toml"}
)


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit.

    Attributes:
        revision: Its full hash.
        author: Name.
        date: Of the author, ISO 8601.
        subject: First line of the message.
        files: Paths that it changes, relative to the root of the repository.
    """

    revision: str
    author: str
    date: str
    subject: str
    files: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.revision[:10]} {self.author}, {self.date}: {self.subject}"


def read_commit(repo: Path, revision: str) -> Commit:
    """Return one commit with the files that it changes; of a merge, those it changes in its first parent.

    Raises:
        KptError: There is no such commit.
    """
    told = git(
        repo, "log", "-1", "--first-parent", "-m", "--name-only", f"--format={_FORMAT}", commit_of(revision, repo)
    )
    return _commit(told.splitlines())


def commits_between(repo: Path, base: str, head: str, *, most: int = _MOST_READ) -> tuple[Commit, ...]:
    """Return the commits that head has and base has not, newest first, without merges.

    Raises:
        KptError: A revision is unknown.
    """
    span = f"{commit_of(base, repo)}..{commit_of(head, repo)}"
    told = git(repo, "log", "--no-merges", f"-{most}", "--name-only", f"--format=%x1e{_FORMAT}", span)
    return tuple(_commit(part.splitlines()) for part in told.split("\x1e") if part.strip())


def list_commits(repo: Path, *options: str) -> tuple[Commit, ...]:
    """Return the commits that options of `git log` choose, in its order, without their files.

    Raises:
        KptError: git refuses.
    """
    return tuple(_commit([line]) for line in git(repo, "log", f"--format={_FORMAT}", *options).splitlines())


def _commit(lines: Sequence[str]) -> Commit:
    revision, author, date, subject = lines[0].split("\x1f", 3)
    return Commit(revision, author, date, subject, tuple(line for line in lines[1:] if line))


def relevance(repo: Path, commit: Commit, shares: Mapping[str, float], names: Sequence[str] = ()) -> float:
    """Return how much a commit has to do with what moved: 0.0 where it changes no code, else more for each trace.

    Args:
        repo: The repository.
        commit: From it.
        shares: Share of the slowdown by class of kernels; also `idle`, `memory` and `software`.
        names: Operators that moved: `gelu` of `aten::gelu`.
    """
    paths = [path for path in commit.files if not _IDLE_PATHS.search(path) or _PACKAGE_PATHS.search(path)]
    if not paths:
        return 0.0
    changed = git(
        repo,
        "show",
        "--format=",
        "--unified=0",
        "--no-ext-diff",
        commit.revision,
        "--",
        *paths[:100],
    )[:_MOST_CHARACTERS]
    lines = "\n".join(line[1:] for line in changed.splitlines() if re.match(r"[+-](?![+-]{2})", line))
    total = 0.1 if any(PurePosixPath(path).suffix in _CODE for path in paths) else 0.02
    told = "\n".join(paths)
    for kind, share in shares.items():
        words = _WORDS.get(kind)
        if words is None:
            continue
        where = told if kind == "software" else lines
        total += share * bool(re.search(words, where, re.IGNORECASE))
        total += 0.5 * share * (kind != "software" and bool(re.search(words, told, re.IGNORECASE)))
    return total + 0.5 * any(re.search(rf"\b{re.escape(name)}\b", lines) for name in names if len(name) > 2)
