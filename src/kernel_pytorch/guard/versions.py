"""Software that differs between the sides, by how likely it explains the slowdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kernel_pytorch.guard.circumstances import Slowdown, Suspect
from kernel_pytorch.guard.types import Culprit, SideFacts

__all__ = ["software_changes", "software_suspects"]

_ALL = ("attention", "matmul", "convolution", "normalization", "elementwise", "reduction", "embedding", "copy", "fused")
_KNOWN: dict[str, tuple[float, tuple[str, ...]]] = {
    "torch": (0.50, (*_ALL, "optimizer", "other", "alike", "idle")),
    "triton": (0.36, ("fused", "matmul")),
    "flash-attn": (0.36, ("attention",)),
    "xformers": (0.35, ("attention",)),
    "transformer-engine": (0.35, ("attention", "matmul", "normalization")),
    "cublas": (0.34, ("matmul",)),
    "cudnn": (0.34, ("convolution", "attention")),
    "onednn": (0.34, ("matmul", "convolution", "fused")),
    "hip": (0.34, (*_ALL, "alike")),
    "cuda": (0.33, ("matmul", "fused", "alike", "idle")),
    "driver": (0.33, ("alike", "idle")),
    "torchao": (0.30, ("matmul", "copy", "optimizer")),
    "kernel_pytorch": (0.30, (*_ALL, "optimizer")),
    "transformers": (0.30, ("attention", "copy", "elementwise", "idle")),
    "python": (0.28, ("idle", "overhead")),
    "pcie": (0.28, ("copy", "communication", "idle")),
    "nvlink": (0.28, ("communication",)),
    "nccl": (0.25, ("communication",)),
    "mig": (0.45, ("alike",)),
    "compiler": (0.22, ("fused",)),
    "numpy": (0.15, ("idle",)),
    "os": (0.12, ("idle",)),
}
"""How likely a change of it is the reason before the profiles are seen, and the classes of kernels that it decides."""
_SETTING = ("setting:", "env:")
_OTHER = 0.10
_FIT = 0.4
_TOLD = 6


def software_changes(base: SideFacts, head: SideFacts) -> tuple[Culprit, ...]:
    """Return all that differs in the software of two sides, what matters most first."""
    return tuple(suspect.culprit for suspect in _each(base, head, Slowdown()))


def software_suspects(base: SideFacts, head: SideFacts, slowdown: Slowdown) -> Iterator[Suspect]:
    """Give what differs in the software; beyond half a dozen, the rest in one."""
    suspects = _each(base, head, slowdown)
    yield from suspects[:_TOLD]
    rest = suspects[_TOLD:]
    if len(rest) == 1:
        yield rest[0]
    elif rest:
        evidence: dict[str, float | str] = {}
        for suspect in rest:
            evidence |= suspect.culprit.evidence
        named = ", ".join(suspect.culprit.what for suspect in rest[:4]) + (", ..." if len(rest) > 4 else "")
        yield Suspect(Culprit("software", f"{len(rest)} other versions: {named}", None, evidence), rest[0].weight)


def _each(base: SideFacts, head: SideFacts, slowdown: Slowdown) -> list[Suspect]:
    suspects = []
    for name in sorted({*base.software, *head.software}):
        old, new = base.software.get(name, ""), head.software.get(name, "")
        if old == new:
            continue
        what = f"{_title(name)} {old or _absent(name)} -> {new or _absent(name)}"
        evidence: Mapping[str, str] = {f"base_{name}": old, f"head_{name}": new}
        suspects.append(Suspect(Culprit("software", what, None, evidence), _weight(name, slowdown)))
    return sorted(suspects, key=lambda suspect: -suspect.weight)


def _weight(name: str, slowdown: Slowdown) -> float:
    if name.startswith(_SETTING):
        return 0.55 if "thread" in name.lower() or "deterministic" in name.lower() else 0.42
    prior, decides = _KNOWN.get(name, _KNOWN.get(_family(name), (_OTHER, ())))
    return prior + _FIT * slowdown.share(*decides)


def _family(name: str) -> str:
    """Return the name under which a library is known: `nvidia-cublas-cu12` is cublas."""
    return name.removeprefix("nvidia-").partition("-cu1")[0].replace("_", "-")


def _title(name: str) -> str:
    for prefix in _SETTING:
        name = name.removeprefix(prefix)
    return name


def _absent(name: str) -> str:
    return "unset" if name.startswith(_SETTING) else "absent"
