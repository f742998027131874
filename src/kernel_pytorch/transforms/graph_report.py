"""Watch a compiled call: graph breaks, recompilations and limits, told by the user's source line.

Dynamo keeps these in memory while it compiles anyway; they are read after a call that compiled, so a steady call costs
one comparison of a counter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._dynamo import utils as dynamo

__all__ = ["Watched"]

_OWN = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


class Watched:
    """A compiled call that writes into `notes` what its compilations ran into."""

    def __init__(self, call: Callable[..., Any], notes: list[str]) -> None:
        self.call = call
        self.notes = notes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frames, breaks = dynamo.counters["frames"]["total"], len(dynamo.graph_break_reasons)
        metrics = len(dynamo.get_compilation_metrics())
        out = self.call(*args, **kwargs)
        if dynamo.counters["frames"]["total"] != frames:
            self._note(breaks, metrics)
        return out

    def _note(self, breaks: int, metrics: int) -> None:
        found = [
            f"graph break at {_where(reason.user_stack)}: {_first_line(reason.reason)}"
            for reason in dynamo.graph_break_reasons[breaks:]
        ]
        for entry in dynamo.get_compilation_metrics()[metrics:]:
            if entry.recompile_reason:
                found.append(f"recompiled {entry.co_filename}:{entry.co_firstlineno}: {entry.recompile_reason}")
        self.notes.extend(dict.fromkeys(note for note in found if note not in self.notes))


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "unknown"


def _where(stack: Sequence[Any]) -> str:
    users = [f for f in stack if not f.filename.startswith(_OWN)] or list(stack)
    return f"{users[-1].filename}:{users[-1].lineno}" if users else "unknown line"
